"""The simulator against what can be reckoned by hand, against the closed form, and against theory."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import replace

import numpy as np
import pytest

from bigtrain.config import Config, DecoderConfig, DeepSpeedConfig, TrainConfig
from bigtrain.errors import ConfigError
from bigtrain.plan import clusters, simulate, sizes, step_time
from bigtrain.plan.simulate import COMPUTE, NETWORK, Task

SMALL = Config(
    model=DecoderConfig(dim=2048, n_layers=24, n_heads=16, vocab_size=50304, max_seq_len=2048),
    engine=DeepSpeedConfig(stage=3),
    train=TrainConfig(global_batch=128, micro_batch=8),
)
LARGE = Config(
    model=DecoderConfig(
        dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248, vocab_size=128256, max_seq_len=8192,
        positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False,
    ),
    engine=DeepSpeedConfig(stage=3),
    train=TrainConfig(global_batch=16384, micro_batch=1, activation_checkpointing=True),
)  # fmt: skip


def test_two_streams_by_hand() -> None:
    """The second layer's weights arrive while the first computes; the third's are late by one second."""
    tasks = [
        Task("gather 0", NETWORK, 1), Task("gather 1", NETWORK, 1), Task("gather 2", NETWORK, 4),
        Task("forward 0", COMPUTE, 2, (0,)), Task("forward 1", COMPUTE, 2, (1, 3)),
        Task("forward 2", COMPUTE, 2, (2, 4)),
    ]  # fmt: skip
    found = simulate.run(tasks)
    starts = {event.name: event.start for event in found.events}
    assert starts == {"gather 0": 0, "gather 1": 1, "gather 2": 2, "forward 0": 1, "forward 1": 3, "forward 2": 6}
    assert (found.seconds, found.busy, found.exposed) == (8, {NETWORK: 6, COMPUTE: 6}, 2)


def test_a_circle_is_found() -> None:
    with pytest.raises(ValueError, match="circle"):
        simulate.run([Task("a", COMPUTE, 1, (1,)), Task("b", NETWORK, 1, (0,))])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("cluster", ["h100x16", "a100_80gbx16"])
def test_a_step_agrees_with_the_closed_form(stage: int, cluster: str) -> None:
    config = replace(SMALL, engine=DeepSpeedConfig(stage=stage))
    found, size = clusters.find(cluster), sizes.of_run(config)
    closed = step_time.estimate(config, found, 16, size).seconds
    assert simulate.step(config, found, 16, size).seconds == pytest.approx(closed, rel=0.08)


def test_prefetching_hides_gathering_unless_the_network_is_slow() -> None:
    size, cluster = sizes.of_run(SMALL), clusters.find("h100x16")
    fast = simulate.step(SMALL, cluster, 16, size)
    slow = simulate.step(SMALL, replace(cluster, inter_node_gb_per_second=0.1), 16, size)
    assert fast.exposed < 0.05 * fast.seconds
    assert slow.exposed > 0.5 * slow.seconds
    # Bound by the network, a step takes as long as its collectives one after another.
    assert slow.seconds == pytest.approx(slow.busy[NETWORK], rel=0.1)


def test_the_slowest_of_many_is_what_the_distribution_says() -> None:
    random = np.random.default_rng(0)
    drawn = np.array([simulate.slowest(1000, 0.05, random) for _ in range(4000)])
    real = np.random.default_rng(1).normal(0, 0.05, (4000, 1000)).max(axis=1)
    assert drawn.mean() == pytest.approx(real.mean(), rel=0.02)
    assert drawn.std() == pytest.approx(real.std(), rel=0.15)
    assert simulate.slowest(1, 0.05, random) == simulate.slowest(1000, 0.0, random) == 0


def test_stragglers_cost_more_on_more_ranks() -> None:
    size = sizes.of_run(SMALL)
    lost = []
    for ranks in (16, 256, 4096):
        config = replace(SMALL, train=replace(SMALL.train, global_batch=8 * ranks))
        cluster = clusters.find(f"h100x{ranks}")
        lost.append(simulate.step(config, cluster, ranks, size, jitter=0.05).stragglers)
    assert 0 < lost[0] < lost[1] < lost[2]


def test_scaling_falls_behind_linear_on_a_slow_network() -> None:
    size = sizes.of_run(SMALL)
    slow = replace(clusters.find("h100x16"), inter_node_gb_per_second=1.0)
    found = simulate.scaling(SMALL, slow, 16, size, [8, 16, 64, 256])
    shares = [share for _, _, share in found]
    assert shares[0] == 1
    assert shares[1] < 0.9
    assert [ranks for ranks, _, _ in found] == [8, 16, 64, 256]
    assert found[3][1] > found[2][1] > found[1][1]


def test_sixteen_thousand_ranks_in_seconds() -> None:
    size, cluster = sizes.of_run(LARGE), clusters.find("h100x16384")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = simulate.step(LARGE, cluster, 16384, size, jitter=0.02)
    assert time.perf_counter() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert found.seconds == pytest.approx(step_time.estimate(LARGE, cluster, 16384, size).seconds, rel=0.1)


def test_the_best_interval_is_youngs_where_checkpoints_are_cheap() -> None:
    assert simulate.best_interval(1, 86400) == pytest.approx(math.sqrt(2 * 86400), rel=0.01)
    assert simulate.best_interval(600, 300) == 300  # hopeless: Daly's limit


def test_goodput_is_best_at_the_best_interval_and_what_theory_says() -> None:
    curve = dict(simulate.intervals(4096, step_seconds=5, checkpoint_seconds=20, failures=2000))
    between = simulate.FAILURE_YEARS * simulate.YEAR / 4096
    best = simulate.best_interval(20, between)
    assert max(curve.values()) - curve[min(curve, key=lambda interval: abs(interval - best))] < 0.004
    # To first order: a checkpoint an interval, half an interval and a restart a failure.
    expected = 1 - 20 / best - (best / 2 + 300) / between
    assert curve[best] == pytest.approx(expected, abs=0.02)


def test_a_run_without_failures_loses_checkpoints_only() -> None:
    found = simulate.goodput(10, 8, 1.0, 2.0, device_failure_years=1e9, interval_seconds=100)
    assert found.failures == 0
    assert found.fraction == pytest.approx(100 / 102)
    assert found.hours == pytest.approx(10 + found.checkpoint_hours)


def test_hours_add_up() -> None:
    found = simulate.goodput(24 * 30, 4096, 5.0, 20.0)
    assert found.failures > 10
    assert found.hours == pytest.approx(720 + found.lost_hours + found.checkpoint_hours + found.restart_hours)
    assert found.timeline[0] == (0.0, "start")
    assert sum(what == "failure" for _, what in found.timeline) == found.failures


def test_a_run_that_never_gets_ahead_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not get ahead"):
        simulate.goodput(100, 1_000_000, 5.0, 600.0, device_failure_years=0.5)
    with pytest.raises(ConfigError, match="hours"):
        simulate.goodput(0, 8, 1.0, 1.0)
