"""DeepSpeed's launcher without DeepSpeed around it starts the same ranks."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys

import pytest

from bigtrain.launch import light_launcher

WORLD = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 3]}).encode()).decode()
OF_IMPORTS = ("PYTORCH_NVML_BASED_CUDA_CHECK", "_MLFLOW_")  # what the real one's imports leave, as a rank's own do


def started(module: str, accelerator: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, f"--world_info={WORLD}", "--master_port=29999", "--no_local_rank",
         "--log_level=critical", *command],
        env=os.environ | {"DS_ACCELERATOR": accelerator}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_ranks_get_the_same_environment_as_from_the_real_one() -> None:
    said: list[list[str]] = []
    for module in (light_launcher.LAUNCHER, "bigtrain.launch.light_launcher"):
        done = started(module, "cpu", "--no_python", "env")
        assert done.returncode == 0, done.stderr
        said.append(sorted(line for line in done.stdout.splitlines() if not line.startswith(OF_IMPORTS)))
    assert said[0] == said[1]
    for variable in ("RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2", "CUDA_VISIBLE_DEVICES=0,3", "MASTER_PORT=29999"):
        assert variable in said[1]


def test_the_variables_are_deepspeeds() -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    theirs = {"cpu": CPU_Accelerator(), "cuda": CUDA_Accelerator()}
    for name in light_launcher.ACCELERATORS:
        assert theirs[name].visible_devices_envs() == [light_launcher.VISIBLE]


@pytest.mark.parametrize(("accelerator", "imported"), [({"DS_ACCELERATOR": "cuda"}, False), ({}, True)])
def test_torch_is_imported_only_where_the_accelerator_is_not_known(accelerator: dict[str, str], imported: bool) -> None:
    code = (
        "import atexit, sys; from bigtrain.launch import light_launcher;"
        "atexit.register(lambda: print('torch' in sys.modules)); light_launcher.main()"
    )
    words = [f"--world_info={WORLD}", "--no_python", "--no_local_rank", "--log_level=critical", "true"]
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=inherited | accelerator, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(imported)), done.stderr


def test_a_rank_that_fails_ends_the_launcher_with_its_status() -> None:
    assert started("bigtrain.launch.light_launcher", "cpu", "--no_python", "false").returncode == 1
