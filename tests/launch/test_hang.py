"""When silence counts as a hang and which rank is named. The same with real ranks is in test_recovery.py."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bigtrain import heartbeat
from bigtrain.launch import hang
from bigtrain.launch.hang import HangDetector


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(hang.time, "monotonic", lambda: now[0])
    return now


def write(run: Path, rank: int, phase: str, step: int, turn: float) -> None:
    (run / heartbeat.FOLDER).mkdir(exist_ok=True)
    record = f'{{"process": 1, "phase": "{phase}", "step": {step}, "time": {turn}}}'
    (run / heartbeat.FOLDER / f"rank-{rank}.json").write_text(record)


def wait(detector: HangDetector, clock: list[float], seconds: float) -> hang.Hang | None:
    for _ in range(int(seconds)):
        clock[0] += 1
        found = detector.look({}, set())
        if found:
            return found
    return None


def test_the_rank_that_fell_silent_first_is_named_with_its_phase(tmp_path: Path, clock: list[float]) -> None:
    detector = HangDetector(tmp_path, 2, hang_seconds=10)
    write(tmp_path, 0, heartbeat.STEP, 7, 1)
    write(tmp_path, 1, heartbeat.STEP, 7, 1)
    assert wait(detector, clock, 3) is None
    write(tmp_path, 0, heartbeat.STEP, 8, 2)
    found = wait(detector, clock, 12)
    assert found is not None
    assert (found.rank, found.phase, found.step) == (1, heartbeat.STEP, 7)
    assert 10 < found.seconds <= 12


def test_slow_phases_may_take_longer_and_zero_waits_for_ever(tmp_path: Path, clock: list[float]) -> None:
    detector = HangDetector(tmp_path, 1, hang_seconds=100)
    write(tmp_path, 0, heartbeat.SAVING, 7, 1)
    assert wait(detector, clock, 590) is None
    assert wait(detector, clock, 20) is not None
    assert wait(HangDetector(tmp_path, 1, hang_seconds=0), clock, 10000) is None


def test_a_rank_that_never_came_is_found_and_one_that_has_ended_is_not(tmp_path: Path, clock: list[float]) -> None:
    detector = HangDetector(tmp_path, 2, hang_seconds=1)
    found = wait(detector, clock, 400)
    assert found is not None
    assert found.phase == heartbeat.STARTING
    clock[0] += 1
    assert detector.look({}, {0, 1}) is None


def test_time_in_which_the_supervisor_itself_was_stopped_does_not_count(tmp_path: Path, clock: list[float]) -> None:
    detector = HangDetector(tmp_path, 1, hang_seconds=10)
    write(tmp_path, 0, heartbeat.STEP, 7, 1)
    assert wait(detector, clock, 3) is None
    clock[0] += 1000
    assert detector.look({}, set()) is None
    assert wait(detector, clock, 12) is not None


def test_a_stack_tells_who_waits_in_a_collective() -> None:
    head = "Current thread 0x1 (most recent call first):\n"
    assert hang._waits(head + '  File "/x/torch/distributed/distributed_c10d.py", line 3 in all_reduce\n')
    assert not hang._waits(head + '  File "/x/sitecustomize.py", line 13 in trouble\n')
    assert not hang._waits("")


def test_a_beat_costs_less_than_a_thousandth_of_a_step_of_ten_milliseconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_file", None)
    heartbeat.start(tmp_path, 0)
    heartbeat.phase(heartbeat.STEP, 1)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            heartbeat.beat()
        times.append((time.perf_counter() - began) / 1000)
        if times[-1] < 1e-5:
            break
    assert min(times) < 1e-5
    assert (tmp_path / heartbeat.FOLDER / "rank-0.json").stat().st_size == heartbeat.RECORD_BYTES
    monkeypatch.setattr(heartbeat, "_file", None)
