"""`python -m bigtrain.launch.light_launcher ARGUMENTS`: deepspeed.launcher.launch without waiting for torch.

That module starts the ranks of one host, and imports all of DeepSpeed and torch first, while no rank has begun: two to
six seconds before each run. It uses three things of them: a logger, its level, and the name of the variable that says
which GPUs a rank sees. Here its code runs with stand-ins for those, and as it is where the accelerator is another one.
"""

from __future__ import annotations

import importlib
import logging
import os
import runpy
import sys
from importlib.util import find_spec
from types import ModuleType

LAUNCHER = "deepspeed.launcher.launch"
ACCELERATORS = ("cpu", "cuda")  # by DS_ACCELERATOR, whose variable is this
VISIBLE = "CUDA_VISIBLE_DEVICES"


class _Accelerator:
    """What the launcher asks DeepSpeed's accelerator for."""

    def visible_devices_envs(self) -> list[str]:
        return [VISIBLE]

    def set_visible_devices_envs(self, environment: dict[str, str], devices: list[int]) -> None:
        environment[VISIBLE] = ",".join(map(str, devices))


def main() -> None:
    if os.environ.get("DS_ACCELERATOR") in ACCELERATORS:
        _stand_in()
    runpy.run_module(LAUNCHER, run_name="__main__", alter_sys=True)


def _stand_in() -> None:
    """Put the three things where the launcher imports them from; its other modules are found as ever."""
    spec = find_spec("deepspeed")  # of a package without parents: nothing is imported
    if spec is None or not spec.submodule_search_locations:
        return
    logger = logging.getLogger("DeepSpeed")
    for name in ("deepspeed", "deepspeed.utils"):
        package = ModuleType(name)
        inside = name.split(".")[1:]
        package.__path__ = [os.path.join(root, *inside) for root in spec.submodule_search_locations]
        sys.modules[name] = package
    utils = sys.modules["deepspeed.utils"]
    utils.logger = logger  # type: ignore[attr-defined]
    utils.set_log_level_from_string = lambda level: logger.setLevel(level.upper())  # type: ignore[attr-defined]
    utils.get_numactl_cmd = importlib.import_module("deepspeed.utils.numa").get_numactl_cmd  # type: ignore[attr-defined]
    sys.modules["deepspeed.accelerator"] = ModuleType("deepspeed.accelerator")
    sys.modules["deepspeed.accelerator"].get_accelerator = _Accelerator  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
