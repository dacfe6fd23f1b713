"""The simulator against what can be reckoned by hand, against the closed form, and against theory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bigtrain.config import Config, DecoderConfig, DeepSpeedConfig, TrainConfig
from bigtrain.errors import ConfigError
from bigtrain.plan import clusters, simulate, sizes, step_time
from bigtrain.plan.simulate import COMPUTE, NETWORK, Task
from tests.plan.test_recommend import plan

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


@pytest.mark.parametrize("ranks", [2, 3, 8, 1000])
def test_the_slowest_of_many_is_what_the_distribution_says(ranks: int) -> None:
    real = np.random.default_rng(1).normal(0, 0.05, (20_000, ranks)).max(axis=1)
    assert simulate.slowest(ranks, 0.05) == pytest.approx(real.mean(), rel=0.03)
    assert simulate.slowest(1, 0.05) == simulate.slowest(1000, 0.0) == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_stragglers_cost_more_on_more_ranks(stage: int) -> None:
    """All wait for the slowest: a step is longer by as much as it computes longer, where communication is hidden."""
    small, lost = replace(SMALL, engine=DeepSpeedConfig(stage=stage)), []
    size = sizes.of_run(small)
    for ranks in (16, 64, 256):
        config = replace(small, train=replace(small.train, global_batch=8 * ranks))
        cluster = clusters.find(f"h100x{ranks}")
        even, uneven = (simulate.step(config, cluster, ranks, size, jitter).seconds for jitter in (0.0, 0.05))
        assert uneven - even <= simulate.slowest(ranks, 0.05) * even
        lost.append((uneven - even) / even)
    assert 0.05 < lost[0] < lost[1] < lost[2]


def test_scaling_falls_behind_linear_on_a_slow_network() -> None:
    size = sizes.of_run(SMALL)
    slow = replace(clusters.find("h100x16"), inter_node_gb_per_second=1.0)
    found = simulate.scaling(SMALL, slow, 16, size, [8, 16, 64, 256])
    shares = [share for _, _, share in found]
    assert shares[0] == 1
    assert shares[1] < 0.9
    assert [ranks for ranks, _, _ in found] == [8, 16, 64, 256]
    assert found[3][1] > found[2][1] > found[1][1]


def test_a_step_on_sixteen_thousand_ranks_takes_seconds_and_little_memory_on_one_core() -> None:
    """By itself: this process has torch in it."""
    code = """
import json, os, re, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from bigtrain.config import Config, DecoderConfig, DeepSpeedConfig, TrainConfig
from bigtrain.plan import clusters, simulate, sizes
config, cluster = CONFIG, clusters.find("h100x16384")
seconds = simulate.step(config, cluster, 16384, sizes.of_run(config), jitter=0.02).seconds
assert "torch" not in sys.modules
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss is its parent's, too
print(json.dumps([seconds, time.process_time(), peak_kib]))
""".replace("CONFIG", f"Config(model={LARGE.model}, engine={LARGE.engine}, train=TrainConfig(global_batch=16384, "
            "micro_batch=1, activation_checkpointing=True))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, cpu_seconds, peak_kib = json.loads(done.stdout)
    assert cpu_seconds <= 10
    assert peak_kib * 1024 <= 1e9
    closed = step_time.estimate(LARGE, clusters.find("h100x16384"), 16384, sizes.of_run(LARGE)).seconds
    assert closed < seconds < 1.1 * closed


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
    kinds = [each.kind for each in found.periods]
    assert kinds.count("restart") == found.failures
    assert found.periods[0].start == 0
    assert found.periods[-1].end == pytest.approx(found.hours)
    assert all(a.end == b.start for a, b in zip(found.periods, found.periods[1:], strict=False))
    taken = {kind: sum(each.end - each.start for each in found.periods if each.kind == kind) for kind in set(kinds)}
    assert taken["restart"] == pytest.approx(found.restart_hours)
    assert taken["lost"] == pytest.approx(found.lost_hours)
    assert taken["work"] == pytest.approx(720 + found.checkpoint_hours)
    assert 20 / 3600 * sum(each.saves for each in found.periods) == pytest.approx(found.checkpoint_hours)


def test_the_mean_of_runs_is_what_theory_says() -> None:
    """Daly 2006: (M + R) (exp((interval + C) / M) - 1) for each interval."""
    between = simulate.FAILURE_YEARS * simulate.YEAR / 4096
    theory = (between + 300) * math.expm1((3600 + 20) / between) / 3600
    for hours in (2, 100, 1e5, 1e12):
        found = simulate.expected(hours, 4096, 5.0, 20.0, interval_seconds=3600)
        assert found.hours / hours == pytest.approx(theory, rel=0.03)
        assert 1 / found.fraction == pytest.approx(found.hours / hours)


def test_a_checkpoint_that_is_not_yet_written_is_lost() -> None:
    at_once = simulate.goodput(24 * 30, 4096, 5.0, 1.0, interval_seconds=1000)
    slow = simulate.goodput(24 * 30, 4096, 5.0, 1.0, interval_seconds=1000, write_seconds=900)
    # The checkpoint before is an interval older, and 899 of 1001 seconds are spent writing one.
    assert slow.lost_hours / slow.failures > 1.5 * at_once.lost_hours / at_once.failures
    assert simulate.goodput(24 * 30, 4096, 5.0, 1.0, write_seconds=9000).interval_seconds == 9000


def test_a_run_that_never_gets_ahead_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not get ahead"):
        simulate.goodput(100, 1_000_000, 5.0, 600.0, device_failure_years=0.5)
    with pytest.raises(ConfigError, match="hours"):
        simulate.goodput(0, 8, 1.0, 1.0)


# ------------------------------------------------------------------------------------------ the command

LLAMA = ["model=llama_1b", "engine=zero3", "train.global_batch=4096", "cluster=h100x4096", "tokens=2e13"]


def simulation(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(*LLAMA, "simulate=true", "output=json", *arguments))
    return found | found["simulation"]


def test_the_command_simulates_a_step_beside_the_closed_form() -> None:
    even, uneven = simulation("jitter=0"), simulation("jitter=0.1")
    step = even["step"]
    assert step["closed_form_seconds"] == pytest.approx(even["step_seconds"])
    assert step["seconds"] == pytest.approx(step["closed_form_seconds"], rel=0.1)
    assert step["closed_form_exposed_communication_seconds"] == pytest.approx(even["time"]["communication"])
    assert step["exposed_communication_seconds"] > 0
    assert step["stragglers_seconds"] == 0
    assert uneven["step"]["stragglers_seconds"] > 0.05 * step["seconds"]
    assert uneven["step"]["seconds"] == pytest.approx(step["seconds"] + uneven["step"]["stragglers_seconds"])
    points = {point["ranks"]: point for point in uneven["scaling"]}
    assert {8, 4096, 32768} <= set(points)
    assert points[8]["of_linear"] == 1 > points[4096]["of_linear"]


def test_the_command_simulates_days_with_failures() -> None:
    found = simulation("train.save_every=2000")
    run, asked, best = found["run"], found["run"]["at_save_every"], found["run"]["at_best"]
    assert run["hours"] == pytest.approx(run["steps"] * found["step"]["seconds"] / 3600)
    assert run["failures_expected"] == pytest.approx(run["hours"] * 4096 / run["mtbf_hours"])
    assert asked["save_every"] == 2000
    assert asked["interval_seconds"] == pytest.approx(2000 * found["step"]["seconds"])
    assert asked["goodput"] < best["goodput"] < 1
    assert run["hours"] < best["hours"] < asked["hours"]
    other = simulation("train.save_every=2000", "mtbf_hours=5000")
    assert other["run"]["failures_expected"] == pytest.approx(run["hours"] * 4096 / 5000)
    assert other["run"]["at_save_every"]["goodput"] < asked["goodput"]


def test_the_command_says_what_it_simulated() -> None:
    text = plan(*LLAMA, "simulate=true", "train.save_every=2000")
    for said in ("simulated step:", "stragglers", "scaling", "4,096:", "failures in", "every 2,000 steps", "(best)"):
        assert said in text, said
    assert "simulated" not in plan(*LLAMA)
    never = plan(*LLAMA, "simulate=true", "mtbf_hours=100")
    assert "saving only at the end (train.save_every): never gets ahead" in never
    assert simulation("mtbf_hours=100")["run"]["at_save_every"] is None


@pytest.mark.parametrize(
    "given",
    ["jitter=-0.1", "jitter=.nan", "jitter=.inf", "jitter=2", "mtbf_hours=0", "mtbf_hours=-5", "mtbf_hours=.nan",
     "mtbf_hours=.inf", "mtbf_hours=1e-300"],
)  # fmt: skip
def test_what_cannot_be_simulated_is_one_line(given: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{given.split('=')[0]}=.*: must be from 0[^\n]*$"):
        plan(*LLAMA, "simulate=true", given)


def test_very_long_and_very_short_runs_are_simulated() -> None:
    for tokens in ("1", "1e30"):
        run = simulation(f"tokens={tokens}", "train.save_every=100")["run"]
        assert 0 < run["at_save_every"]["goodput"] <= 1


def test_a_slow_disk_does_not_lose_the_page(tmp_path: Path) -> None:
    slow = yaml.safe_load((clusters._folder() / "h100.yaml").read_text()) | {"disk_gb_per_second": 1e-7}
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(slow))
    keys = [*LLAMA, f"cluster={tmp_path}/slow.yamlx4096", "train.async_save=false", "report=true", f"out={tmp_path}"]
    plan(*keys)
    html = (tmp_path / "plan.html").read_text()
    assert '<img id="checkpoints"' in html
    assert '<img id="days"' not in html  # there are none in which it gets ahead


def test_the_page_has_the_days_of_the_run_and_the_pareto_front_without_being_asked_for_one(tmp_path: Path) -> None:
    text = plan(*LLAMA, "report=true", f"out={tmp_path}", "tokens=1e30")
    html = (tmp_path / "plan.html").read_text()
    for picture in ("memory", "step", "scaling", "checkpoints", "timeline", "days", "front"):
        assert f'<img id="{picture}"' in html
    assert "best for" not in text
    assert "Best for" not in html
