"""What `bigtrain doctor` asks of a node that takes a while: `python -m bigtrain.launch.node_report`.

A process of its own, for it imports torch and deepspeed, and for a driver that hangs must not hold up the agent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from bigtrain.launch import gpu_health, ops


def start(device: str, launch_id: dict[str, str]) -> subprocess.Popen[bytes]:
    """`bandwidth.collect` has its result, {"gpu_problems": [...], "ops": {name: state}}, once it is there."""
    return subprocess.Popen(
        [sys.executable, "-m", "bigtrain.launch.node_report"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=dict(os.environ, DS_ACCELERATOR=device, PATH=ops.search_path()) | launch_id,
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({"gpu_problems": gpu_health.problems(), "ops": ops.report()}))
