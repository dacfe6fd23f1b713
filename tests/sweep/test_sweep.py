"""Sweeps as a user types them: Hydra's sweeper and ours, launchers with processes of their own, trials that train."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain import compose, runs
from bigtrain.config import DecoderConfig
from bigtrain.launch.train import checked
from bigtrain.plan import sizes as planned
from bigtrain.sweep import trials
from tests.runs import TINY, Running, bigtrain, result

QUICK = [*TINY, "launch.ranks=1", "logger=quiet", "train.eval_every=0"]
OPTUNA = ["hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "model.dim=choice(16,32)"]


def jobs_of(*overrides: str) -> list[compose.Job]:
    found: list[compose.Job] = []
    compose.run(["-m", *overrides], lambda job: found.append(job) or 0.0)
    return found


def test_a_job_knows_its_sweep(tmp_path: Path) -> None:
    jobs = jobs_of("experiment=tiny", f"run_dir={tmp_path}/s", "model.dim=16,32", "train.steps=3")
    assert [job.number for job in jobs] == [0, 1]
    assert jobs[1].sweep is not None
    assert (jobs[1].sweep.directory, jobs[1].sweep.varied) == (f"{tmp_path}/s", ["model.dim"])
    assert jobs[1].data["run_dir"] == f"{tmp_path}/s/1"


def test_optuna_composes_what_it_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trials.COMMAND, "c")
    jobs = jobs_of(*OPTUNA, "hydra.sweeper.n_trials=4", "experiment=tiny", f"run_dir={tmp_path}/s", "train.seed=3")
    assert len(jobs) == 4
    for job in jobs:
        config = checked(job.data)
        assert 1e-4 <= config.optimizer.lr <= 1e-1
        assert getattr(config.model, "dim", 0) in (16, 32)
        assert config.train.seed == 3
        assert job.sweep is not None
        assert job.sweep.varied == ["optimizer.lr", "model.dim"]
        assert job.sweep.sweeper["storage"].endswith("/s/study.db")
    assert len({checked(job.data).optimizer.lr for job in jobs}) == 4


def test_the_ladder_has_the_sizes_and_tokens_that_it_promises(tmp_path: Path) -> None:
    jobs = jobs_of("experiment=ladder", f"run_dir={tmp_path}/s")
    assert len(jobs) == 15
    sizes = set()
    for job in jobs:
        config = checked(job.data)
        assert config.train.tokens_per_parameter is not None
        assert isinstance(config.model, DecoderConfig)
        parameters = planned.of_model(replace(config.model, vocab_size=1024)).total
        tokens = config.train.steps * config.train.global_batch * config.model.max_seq_len
        assert tokens / parameters == pytest.approx(config.train.tokens_per_parameter, rel=0.03)
        sizes.add(parameters)
    assert 3e5 < min(sizes) < 5e5
    assert 1.9e7 < max(sizes) < 2.3e7
    few = ["model.dim=64,96", "train.tokens_per_parameter=1"]
    short = jobs_of("experiment=ladder_short", f"run_dir={tmp_path}/t", *few)
    assert [job.data["model"]["dim"] for job in short] == [64, 96]  # the command line takes the place of the recipe's


def test_slurm_is_passed_through(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=8"]
    compose.run(["--cfg", "hydra", *arguments], lambda job: 0.0)
    launcher = yaml.safe_load(capsys.readouterr().out)["hydra"]["launcher"]
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert (launcher["partition"], launcher["gpus_per_node"]) == ("gpu", 8)


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit_local", marks=pytest.mark.soak)])
def test_trials_in_a_launchers_own_processes_report_back(tmp_path: Path, data_cache: Path, launcher: str) -> None:
    """The table, the failure and the exit status come from records: the parent has seen none of the trials."""
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    output = bigtrain(
        "train", "-m", *QUICK, f"run_dir={tmp_path}/s", f"data.cache_dir={data_cache}", "train.steps=2",
        f"hydra/launcher={launcher}", *more, "model.dim=16,17,32", expect=1,
    )  # fmt: skip
    assert "sweep: 2 of 3 jobs finished" in output
    assert "failed: model.dim=17: not divisible" in output
    assert "best: trial" in output
    for number in (0, 2):
        assert result(tmp_path / f"s/{number}")["status"] == "finished"
        placement = json.loads((tmp_path / f"s/{number}/launch.json").read_text())["placement"]
        cores = len(os.sched_getaffinity(0))
        if launcher == "joblib":
            assert placement["ranks"] * placement["threads_per_rank"] <= max(1, cores // 2)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twelve_trials_one_of_which_is_killed(tmp_path: Path, data_cache: Path) -> None:
    sweep = tmp_path / "s"
    typed = ["train", "-m", *QUICK, *OPTUNA, f"run_dir={sweep}", f"data.cache_dir={data_cache}", "train.steps=60",
             "train.eval_every=10", "hydra.sweeper.n_trials=12", "launch.restarts=0"]  # fmt: skip
    process = Running(*typed)
    killed = sweep / "4"
    while process.poll() is None and not (killed / "metrics.jsonl").exists():
        time.sleep(0.1)
    (beat,) = runs.heartbeats(killed)
    os.kill(int(beat["process"]), signal.SIGKILL)
    output = "".join(process.communicate(timeout=1500))
    assert process.returncode == 1, output
    states = {trial.number: trial.status for trial in trials.read(sweep)}
    assert list(states) == list(range(12))
    assert [number for number, status in states.items() if status == "failed"] == [4]
    assert "failed: rank 0 was killed by SIGKILL" in output
    again = bigtrain(*typed, timeout=600)
    assert trials.read(sweep)[4].status in ("finished", "pruned")
    assert again.count("\njob ") + again.startswith("job ") == 1  # the others are done
    bigtrain("train", "--config-dir", str(sweep), "experiment=best", f"run_dir={tmp_path}/best",
             f"data.cache_dir={data_cache}", "train.steps=2")  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_ladder_is_climbed(tmp_path: Path, data_cache: Path) -> None:
    bigtrain("train", "-m", "experiment=ladder_short", f"run_dir={tmp_path}/l", f"data.cache_dir={data_cache}",
             "logger=quiet", timeout=3000)  # fmt: skip
    output = bigtrain("report", "--ladder", f"{tmp_path}/l", timeout=600)
    found = json.loads((tmp_path / "l/ladder/ladder.json").read_text())
    assert len(found["points"]) == 12
    assert all(abs(check["error"]) < 0.05 for check in found["held_out"]), output


def test_the_same_command_again_has_nothing_to_do(tmp_path: Path, trained_run: Path, data_cache: Path) -> None:
    """And with another grid only what is new; a finished trial is known by its overrides, in whatever directory."""
    sweep = tmp_path / "s"
    fixed = [*QUICK, f"run_dir={sweep}", f"data.cache_dir={data_cache}", "train.steps=2"]
    known = {"number": 3, "job": 0, "command": "before", "status": "finished", "objectives": {"eval/loss": 1.0}}
    overrides = [*fixed, "train.seed=0"]
    record: dict[str, Any] = {**known, "overrides": overrides, "varied": {"train.seed": "0"}}
    (sweep / "trials").mkdir(parents=True)
    (sweep / "trials" / "3.json").write_text(json.dumps(record))
    shutil.copytree(trained_run, sweep / "3")
    output = bigtrain("train", "-m", *fixed, "train.seed=0,1", "launch=dryrun")
    assert "sweep: 2 of 2 jobs finished" in output
    assert {trial.number for trial in trials.read(sweep)} == {1, 3}
    output = bigtrain("train", "-m", *fixed, "train.seed=0")
    assert "is finished at step 2" in output
    assert (sweep / "3" / "result.json").read_bytes() == (trained_run / "result.json").read_bytes()
