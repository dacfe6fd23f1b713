"""Runs that go on by themselves: ranks killed, frozen and failing under the real launcher; crash loops; preemption."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.test_local import Command, commands, finish, ranks, steps, wait_for_steps
from tests.runs import Running, losses, result

pytestmark = pytest.mark.timeout(400)
SAVING = ["train.steps=1000000", "train.save_every=5", "schedule=constant", "schedule.warmup_steps=0"]

# Imported by Python at its start, before any of ours: what a bug in a user's own code would do to a rank.
TROUBLE = """
import os, sys
if os.environ.get("RANK") == "1" and os.environ.get("TROUBLE"):
    import threading, time, json
    action, step = os.environ["TROUBLE"].split(":")
    import torch.optim
    taken = 0
    def trouble(optimizer, *_):
        global taken
        taken += 1
        if taken >= int(step):
            if action == "sleep":
                time.sleep(1000)
            if action == "raise":
                raise RuntimeError("a bug of the user's")
            os.kill(os.getpid(), 9)
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    register_optimizer_step_pre_hook(trouble)
"""


@pytest.fixture
def command(tmp_path: Path, corpus: Path) -> Iterator[Command]:
    yield from commands(tmp_path, corpus)


def trouble(tmp_path: Path, what: str) -> list[str]:
    """Overrides that make rank 1 die, fail or sleep in a step."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(TROUBLE)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    return [f"launch.env.TROUBLE='{what}'", f"launch.env.PYTHONPATH='{path}'"]


def restarted(process: Running, run: Path, count: int) -> list[dict[str, object]]:
    """The record of restarts once there are so many and the run has logged a step after the last."""
    limit = time.monotonic() + 150
    while not (run / "restarts.jsonl").exists() or len(lines(run)) < count:
        assert process.poll() is None, finish(process)
        assert time.monotonic() < limit
        time.sleep(0.05)
    return lines(run)


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]


def stop(process: Running) -> tuple[int, str, str]:
    process.send_signal(signal.SIGTERM)
    return finish(process)


def log_time_after(run: Path, moment: float, process: Running) -> float:
    """When the first step after `moment` was logged."""
    limit = time.monotonic() + 150
    while time.monotonic() < limit:
        for line in (run / "metrics.jsonl").read_text().splitlines():
            if line.endswith("}") and json.loads(line)["time"] > moment:
                return float(json.loads(line)["time"])
        assert process.poll() is None, finish(process)
        time.sleep(0.05)
    raise AssertionError("no step after the restart")


def test_a_killed_rank_a_frozen_rank_and_preemption(command: Command, tmp_path: Path) -> None:
    """One run: rank 1 is killed, then rank 0 frozen, then the run is preempted by a SIGTERM to a rank alone."""
    run = tmp_path / "run"
    process = command.start("run_dir=run", *SAVING, "launch.hang_seconds=4")
    wait_for_steps(process, run, 12)
    peers = ranks(tmp_path)
    killed = time.time()
    peers[1].kill()
    assert not psutil.wait_procs(list(peers.values()), timeout=6)[1]  # 2 s on a quiet machine
    print(f"from the kill to the last peer's end: {time.time() - killed:.1f} s")
    (first,) = restarted(process, run, 1)
    assert str(first["cause"]).startswith("rank 1 was killed")
    again = log_time_after(run, time.time(), process)
    print(f"from the kill to a step: {again - killed:.1f} s")
    assert again - killed < 10 + 15  # the last for a busy machine
    wait_for_steps(process, run, max(steps(run)) + 7)  # past the next checkpoint

    frozen = time.time()
    ranks(tmp_path)[0].suspend()
    second = restarted(process, run, 2)[1]
    took = float(str(second["time"])) - frozen
    print(f"from SIGSTOP to the restart: {took:.1f} s")
    assert str(second["cause"]).startswith("rank 0 was stopped by a signal while ")
    assert took < 4 + 5 + 6  # the last for a busy machine
    assert "Current thread" in (run / "logs" / "rank-1.log").read_text()
    log_time_after(run, time.time(), process)

    ranks(tmp_path)[1].terminate()
    code, out, error = finish(process)
    assert (code, error) == (0, "")
    assert out.count("restart 1 of 3 from the checkpoint of step ") == 2  # a new checkpoint in between
    done = result(run)
    assert (done["status"], done["restarts"]) == ("stopped", 2)
    assert f"stopped at step {done['train/steps']}; to continue: bigtrain train" in out
    assert steps(run) == list(range(1, done["train/steps"] + 1))


def test_a_crash_loop_ends_and_says_what_repeats(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, error = command.run("run_dir=run", *SAVING, "launch.restarts=1", *trouble(tmp_path, "kill:4"))
    assert code == 1
    assert out.count("from the beginning, there is no checkpoint yet") == 1
    assert error.count("\n") == 1
    assert "gave up: 2 failures without a checkpoint" in error
    assert "each time: rank 1 was killed by SIGKILL" in error
    assert losses(run)


@pytest.mark.soak
def test_a_rank_that_sleeps_in_user_code_is_named_though_all_are_silent(command: Command, tmp_path: Path) -> None:
    arguments = ["launch.hang_seconds=4", "launch.restarts=0", *trouble(tmp_path, "sleep:6")]
    code, _, error = command.run("run_dir=run", *SAVING, *arguments)
    assert code == 1
    assert f"rank 1 hung while in a step, after step {max(losses(tmp_path / 'run'))}:" in error
    assert "in trouble" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


@pytest.mark.soak
def test_an_exception_before_the_first_step_is_not_tried_again(command: Command, tmp_path: Path) -> None:
    code, out, error = command.run("run_dir=run", *SAVING, *trouble(tmp_path, "raise:1"))
    assert code == 1
    assert "a bug of the user's" in error
    assert "restart" not in out


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_launcher_that_is_killed_or_asked_to_stop(command: Command, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = command.start("run_dir=run", *SAVING)
    wait_for_steps(process, run, 12)
    launcher = ranks(tmp_path)[0].parent()
    assert launcher is not None
    launcher.send_signal(number)
    if number == signal.SIGKILL:
        (line,) = restarted(process, run, 1)
        assert "launcher was killed" in str(line["cause"])
        log_time_after(run, time.time(), process)
        assert stop(process)[0] == 0
        assert result(run)["restarts"] == 1
    else:
        assert finish(process)[0] == 0
        assert result(run)["status"] == "stopped"
        assert not (run / "restarts.jsonl").exists()
    assert steps(run) == list(range(1, result(run)["train/steps"] + 1))


@pytest.mark.soak
def test_a_dead_node_loses_at_most_what_came_after_the_checkpoint(command: Command, tmp_path: Path) -> None:
    """Everything is killed at once; the same command goes on."""
    run = tmp_path / "run"
    process = command.start("run_dir=run", *SAVING)
    wait_for_steps(process, run, 12)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.kill()
    process.wait()
    before = losses(run)
    process = command.start("run_dir=run", *SAVING)
    wait_for_steps(process, run, max(before) + 2)
    code, out, _ = stop(process)
    assert code == 0
    assert "resumed at step " in out
    after = losses(run)
    assert {step: after[step] for step in before} == before
