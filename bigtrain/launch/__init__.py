"""One composed and checked run -> processes on this machine or on many, watched until the last one has ended."""

from __future__ import annotations


class Stopped(BaseException):
    """The run was asked to stop and saved itself. A good end, but a sweep must not go on to its next job: so it is no
    Exception, which sweepers may catch."""
