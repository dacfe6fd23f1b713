"""How long from the command to the first step, for each way to start two ranks. `pytest -s` shows the table."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.multinode.hosts import Cluster
from tests.multinode.slurm import Slurm
from tests.runs import bigtrain, command, losses, metrics

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 90  # on a busy machine; the table says what it was


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_every_way_comes_to_its_first_step(
    cluster: Cluster, slurm: Slurm, base: list[str], tmp_path: Path, alone: dict[int, float]
) -> None:
    two_nodes = ["launch.nodes=2", "launch.ranks=1"]
    here = [*two_nodes, "launch.master_address=127.0.0.1", "launch.env.GLOO_SOCKET_IFNAME=lo"]
    arguments = {
        "local 1x2": ["launch.ranks=2"],
        "hostfile 2x1": [],
        "slurm 2x1": ["launch=slurm", *two_nodes, "launch.slurm.poll_seconds=0.3"],
        "torchrun 2x1": ["launch=torchrun", *here, "launch.master_port=29811"],
        "manual 2x1": ["launch=manual", *here, "launch.master_port=29812"],
    }
    seconds: dict[str, float] = {}
    for name, more in arguments.items():
        run = tmp_path / name.replace(" ", "-")
        words = [*base, f"run_dir={run}", "train.steps=1", *more]
        began = time.time()
        if name == "hostfile 2x1":
            out, error = (process := cluster.train(*words)).communicate(timeout=MOST_SECONDS)
            assert process.returncode == 0, out + error
        elif name == "slurm 2x1":
            environment = slurm.everything | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(command("train", *words), env=environment, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            out = bigtrain("train", *words, cwd=ROOT)
            lines = [line for line in out.splitlines() if line.startswith("env ")]
            nodes = [subprocess.Popen(["sh", "-c", line], stdout=subprocess.DEVNULL, env=os.environ) for line in lines]
            assert [node.wait(timeout=MOST_SECONDS) for node in nodes] == [0] * len(lines)
        (first, *_) = [line for line in metrics(run) if "train/loss" in line]
        seconds[name] = first["time"] - began
        assert losses(run)[1] == alone[1], name  # wherever the two ranks are
    print(
        "\nfrom the command to the first step: " + ", ".join(f"{name} {took:.1f} s" for name, took in seconds.items())
    )
    assert max(seconds.values()) < MOST_SECONDS
