"""launch=torchrun, launch=manual, launch=kubernetes: somebody else starts the ranks. Here the run is prepared and what
has to be started is printed; nothing is started and nothing is watched."""

from __future__ import annotations
