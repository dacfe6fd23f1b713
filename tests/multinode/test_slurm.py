"""A real Slurm: the batch job submitted and followed, an allocation's ranks started at once, a killed rank."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.multinode.conftest import FOREVER
from tests.multinode.slurm import Slurm
from tests.runs import bigtrain, command, losses, metrics, result

pytestmark = pytest.mark.timeout(300)
JOB = ["launch=slurm", "launch.nodes=2", "launch.ranks=1", "launch.slurm.poll_seconds=0.3"]
REPOSITORY = Path(__file__).parents[2]


def start(slurm: Slurm, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=REPOSITORY, env=slurm.everything | {"PYTHONPATH": str(REPOSITORY)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=200)
    return process.returncode, out, error


def of_run(run: Path) -> list[psutil.Process]:
    """Ranks, agents and launchers that live: a rank's command line has its run directory."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(run) in word for word in words) and "bigtrain.cli" not in words:
            found.append(process)
    return found


def test_a_job_is_submitted_and_followed_and_learns_what_one_machine_does(
    slurm: Slurm, base: list[str], tmp_path: Path, alone: dict[int, float]
) -> None:
    code, out, error = finish(start(slurm, *command("train", *base, *JOB, "train.steps=6")))
    assert code == 0, out + error
    assert re.search(r"Slurm job \d+ is submitted: 2 nodes x 1 ranks", out)
    assert "finished at step 6" in out
    assert result(tmp_path / "run")["world_size"] == 2
    assert not (tmp_path / "run/.submitted.json").exists()
    assert losses(tmp_path / "run") == alone


@pytest.mark.soak
def test_a_killed_rank_ends_the_job_with_one_line(slurm: Slurm, base: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(slurm, *command("train", *base, *JOB, *FOREVER, "launch.restarts=0"))
    limit = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < limit
        time.sleep(0.1)
    victims = [process for process in of_run(run) if "bigtrain.worker" in process.cmdline()]
    (victim,) = [process for process in victims if process.environ()["RANK"] == "1"]
    began = time.monotonic()
    victim.kill()
    code, _, error = finish(process)
    assert time.monotonic() - began < 30
    assert code == 1
    assert re.match(r"bigtrain: error: rank 1 on node1 was killed( by SIGKILL)? after step \d+", error), error
    while of_run(run):
        assert time.monotonic() - began < 30, of_run(run)
        time.sleep(0.1)


@pytest.mark.soak
def test_inside_an_allocation_the_ranks_start_at_once(slurm: Slurm, base: list[str], tmp_path: Path) -> None:
    allocate = ["salloc", "--nodes=2", "--ntasks-per-node=1", "--quiet"]
    code, out, error = finish(
        start(slurm, *allocate, *command("train", *base, *JOB[:1], "launch.ranks=1", "train.steps=2"))
    )
    assert code == 0, out + error
    assert "submitted" not in out
    assert result(tmp_path / "run")["world_size"] == 2


@pytest.mark.soak
def test_each_trial_of_a_sweep_is_a_job_of_its_own(slurm: Slurm, base: list[str], tmp_path: Path) -> None:
    """The sweep waits for its jobs, and its table and exit status come from what they have left."""
    sweep = tmp_path / "run"
    small = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1"]
    code, out, error = finish(
        start(slurm, *command("train", "-m", *base, *small, "train.steps=2", "launch.ranks=1", "model.n_heads=1,3,2"))
    )
    assert code == 1, out + error
    assert "sweep: 2 of 3 jobs finished" in out
    assert re.search(r"failed: model\.\w+=\d+: ", out), out
    jobs = set()
    for number in (0, 2):
        assert result(sweep / str(number))["status"] == "finished"
        environment = json.loads((sweep / f"{number}/launch.json").read_text())
        jobs.add(environment["host"])
        assert environment["placement"]["ranks"] == 1
    assert "best: trial" in out
    assert slurm.call("squeue", "-h") == ""


def test_the_script_holds_no_value_that_a_shell_would_read(tmp_path: Path) -> None:
    run = tmp_path / "it's $(touch hacked) `x`"
    show = [
        "train",
        "experiment=tiny",
        f"run_dir='{str(run).replace(chr(39), chr(92) + chr(39))}'",
        *JOB,
        "launch.dry_run=true",
    ]
    out = bigtrain(*show, "launch.slurm.time='1:00:00'", "launch.slurm.options=[--exclusive]", cwd=tmp_path)
    text = "\n".join(line.removeprefix("# ") for line in out.split("\n\n")[0].splitlines())
    assert "#SBATCH --time=1:00:00\n#SBATCH --exclusive\n" in text
    script = text.replace("exec ", "printf '%s\\n' ")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(run)
    assert os.listdir(tmp_path) == []
    out = bigtrain(*show, "launch.slurm.partition='a;rm -rf b'", expect=2)
    assert "launch.slurm.partition" in out
