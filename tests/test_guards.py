"""Guards: the rules by themselves, and real ranks on which training goes wrong."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checks import check
from bigtrain.config import GuardConfig, from_dict
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.guards import Guard, spike_limit
from bigtrain.hardware import cpu_has_fp16
from tests.distributed.curves import ENGINES, ZERO
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engines import check_refused

GUARDED = "tests.distributed.guarded"


# ---------------------------------------------------------------------------------------------------- rules


def test_a_spike_stands_out_from_the_median_not_from_outliers() -> None:
    draw = random.Random(0)
    losses = [3 + draw.gauss(0, 0.05) for _ in range(64)]
    assert spike_limit(losses[:15], 10) is None
    limit = spike_limit(losses, 10)
    assert limit is not None
    assert 3.3 < limit < 3.8
    assert spike_limit([*losses[:60], 50, 60, 70, 80], 10) == pytest.approx(limit, rel=0.05)
    assert spike_limit([2.0] * 32, 10) == pytest.approx(2.2)  # all alike: a percent counts as one deviation
    falling = [10 * 0.97**step for step in range(64)]
    assert all(loss <= (spike_limit(falling[:step], 10) or 99) for step, loss in enumerate(falling))


def test_left_out_data_is_met_by_no_step_and_all_else_in_order() -> None:
    guard = Guard(GuardConfig())
    guard.leave_out(5, 7)
    guard.leave_out(20, 22)
    guard.leave_out(7, 9)
    guard.leave_out(10, 10)
    assert guard.left_out == [(5, 10), (20, 22)]
    assert [guard.data_step(step) for step in range(18)] == [*range(5), *range(11, 20), *range(23, 27)]
    again = Guard(GuardConfig())
    again.load_state(guard.state())
    assert [again.data_step(step) for step in range(40)] == [guard.data_step(step) for step in range(40)]


def test_a_run_that_only_spikes_ends() -> None:
    guard = Guard(GuardConfig(spike="skip", max_spikes=3))
    for _ in range(20):
        assert guard.spike(1.0) is None
    for _ in range(3):
        problem = guard.spike(9.0)
        assert problem is not None
        guard.count(problem, 21)
    with pytest.raises(BigtrainError, match=r"step 24: loss 9 is a spike.*train\.guard\.max_spikes"):
        guard.count("loss 9 is a spike", 24)
    guard.spikes = 2
    assert guard.spike(1.0) is None
    assert guard.spikes == 0, "a good step is progress"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("spike", "rollback", "no checkpoint to go back to; set train.save_every"),
        ("spike", "ignore", "one of off, warn, skip, rollback"),
        ("spike_window", 8, "fewer than 16 losses"),
        ("spike_deviations", 0.5, "at least 1"),
        ("max_spikes", 0, "at least 1"),
        ("replay_every", 10, "set train.deterministic=true"),
    ],
)
def test_a_guard_that_cannot_work_is_refused(key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.guard\.{key}=.*{re.escape(says)}"):
        check(from_dict({"train": {"guard": {key: value}}}))


# --------------------------------------------------------------------------------------------- on real ranks


WHERE = {
    "nan": r"(the loss|the gradient of \S+|the output of \S+) \(rank 1, micro-batch 1, samples 30, 31\)",
    "gradient": r"the gradient of \S+ \(rank 1, micro-batch 1, samples 30, 31\)",
    "weight": r"weight blocks\.1\.attention\.out\.weight \(rank 1, micro-batch 0, samples 4, 5\)",
}


@pytest.mark.parametrize(
    ("precision", "choices"), [("fp32", {**ZERO, "ddp": ENGINES["ddp"]}), ("bf16", ZERO), ("fp16", ZERO)]
)
def test_what_is_not_finite_is_found_before_the_update(precision: str, choices: dict[str, Any]) -> None:
    if precision == "fp16" and not cpu_has_fp16():
        check_refused("fp16")
        return
    arguments = {"choices": choices, "precision": precision, "ways": list(WHERE)}
    for do, runs in run_ranks(f"{GUARDED}:spoiled", 2, arguments)[0].items():
        step = 1 if do == "weight" else 4
        for name, found in runs.items():
            pattern = rf"train/(loss|grad_norm) is (nan|inf) at step {step}: .*first in {WHERE[do]}"
            assert re.search(pattern, found["message"]), (do, name, found)
            assert found["steps"] == step - 1, (do, name)
            assert found["finite"], f"{do} {name}: the bad step has reached the weights"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_discarded_step_leaves_no_trace(precision: str) -> None:
    choices = ENGINES if precision == "fp32" else {name: ZERO[name] for name in ("zero0", "zero1", "zero3")}
    (found, _) = run_ranks(f"{GUARDED}:dropped", 2, {"choices": choices, "precision": precision})
    assert found == dict.fromkeys(choices, True)


def test_spikes(tmp_path: Path) -> None:
    over = "rollback over a damaged checkpoint"
    arguments = {"choice": ZERO["zero2"], "policies": ["warn", "skip", "rollback", over], "folder": str(tmp_path)}
    here, there = run_ranks(f"{GUARDED}:spikes", 2, arguments)
    found = here.pop(over)
    assert re.search(r"step-0*20 is damaged \(.*\) and not used", found["warnings"][0])
    assert "back to step 10, without the data around it" in found["warnings"][1]
    assert found["left_out"] == [[23, 25]]
    assert [int(step) for step in found["losses"]] == list(range(1, 33))
    assert there[over]["warnings"] == found["warnings"]
    for policy, found in here.items():
        losses = {int(step): loss for step, loss in found["losses"].items()}
        assert list(losses) == list(range(1, 33)), policy
        assert len(found["warnings"]) == 1, policy
        assert "is a spike" in found["warnings"][0]
        assert found["resumed"] == {"31": losses[31], "32": losses[32]}, policy
        assert all(there[policy][name] == found[name] for name in ("warnings", "left_out", "dropped")), policy
        if policy == "rollback":
            assert found["left_out"] == found["saved"]["left_out"] == [[23, 25]]
            assert losses[25] < 2 * losses[24], "the run met the same data again"
        else:
            assert losses[25] > 5 * losses[24]
            assert found["dropped"] == (policy == "skip")
    assert here["skip"]["losses"]["26"] != here["warn"]["losses"]["26"], "the update was made all the same"


def test_replay_finds_a_flipped_bit_and_changes_nothing() -> None:
    choices = {name: ENGINES[name] for name in ("zero0", "zero2", "zero3", "ddp")}
    for name, (good, bad, without) in run_ranks(f"{GUARDED}:flipped", 2, {"choices": choices, "precision": "fp32"})[
        0
    ].items():
        assert good == without, name
        assert len(good) == 6
        assert re.search(r"step \d: the same micro-batch gave other bits .* on rank 1 \(in .*\):", bad), (name, bad)
