"""lr(step) by hand."""

from __future__ import annotations

import math

import pytest

from bigtrain.config import ScheduleConfig
from bigtrain.schedule import lr_multiplier

STEPS = 100


def curve(**fields: object) -> list[float]:
    schedule = ScheduleConfig(**fields)  # type: ignore[arg-type]
    return [lr_multiplier(schedule, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    assert curve(kind=kind, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_the_last_step_has_the_final_ratio(kind: str) -> None:
    values = curve(kind=kind, warmup_steps=10, final_ratio=0.1)
    assert values[-1] == pytest.approx(0.1)
    assert values[9:] == sorted(values[9:], reverse=True)


def test_shapes_in_the_middle() -> None:
    assert curve(kind="constant", warmup_steps=10)[10:] == [1.0] * 90
    assert curve(kind="linear", final_ratio=0.0)[50] == pytest.approx(1 - 50 / 99)
    cosine = curve(kind="cosine", final_ratio=0.0)
    assert cosine[33] == pytest.approx(0.5 * (1 + math.cos(math.pi * 33 / 99)))
    wsd = curve(kind="wsd", warmup_steps=10, decay_fraction=0.2, final_ratio=0.0)
    assert wsd[10:81] == [1.0] * 71
    assert wsd[90] == pytest.approx(1 - 10 / 19)


def test_a_run_of_warm_up_alone() -> None:
    assert lr_multiplier(ScheduleConfig(kind="cosine", warmup_steps=1), 0, 1) == 1.0
