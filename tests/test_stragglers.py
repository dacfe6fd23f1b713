from __future__ import annotations

import time

import torch

from bigtrain.stragglers import SECONDS, ForwardTimer, Stragglers


def test_forward_passes_are_timed_and_nothing_else() -> None:
    timer = ForwardTimer(torch.device("cpu"))
    timed = timer.timed(lambda seconds: time.sleep(seconds) or "result")
    assert timed(0.05) == "result"
    time.sleep(0.2)
    timed(0.05)
    assert 0.1 <= timer.take() < 0.2
    assert timer.take() == 0.0


def test_the_ranks_metrics() -> None:
    found = Stragglers(["a", "b", "b"]).metrics([1.0, 1.0, 1.0], [0.25, 0.5, 0.3])
    assert found["perf/forward_seconds_min"] == 0.25
    assert found["perf/forward_seconds_max"] == 0.5
    assert abs(found["perf/forward_seconds_mean"] - 0.35) < 1e-9
    assert found["perf/step_seconds_mean"] == 1.0
    assert found["perf/slowest_rank"] == 1.0
    assert Stragglers(["a"]).metrics([1.0], [1.0]) == {}


def test_a_rank_that_stays_slow_is_named_once() -> None:
    judge = Stragglers(["fast", "fast", "slow"])
    slow = [1.0, 1.1, 2.1]
    assert judge.judge(slow, 0.0) is None
    assert judge.judge(slow, SECONDS / 2) is None
    line = judge.judge(slow, SECONDS)
    assert line is not None
    assert "rank 2 on slow" in line
    assert "2.0 x" in line
    assert judge.judge(slow, 2 * SECONDS) is None


def test_a_passing_slowness_is_not_named() -> None:
    judge = Stragglers(["a", "b"])
    for at, seconds in enumerate(([1.0, 2.0], [1.0, 1.1], [1.0, 2.0], [2.0, 1.0])):
        assert judge.judge(seconds, at * 0.6 * SECONDS) is None
