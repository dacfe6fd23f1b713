from __future__ import annotations

import itertools

import pytest

from bigtrain.compress.schedule import fraction, moves
from bigtrain.compress_config import RampConfig

RAMPS = [
    RampConfig("constant", begin=5),
    RampConfig("linear", begin=5, end=25, every=4),
    RampConfig("cubic", begin=0, end=21, every=5),
    RampConfig("multi_step", steps=[3, 10, 12], fractions=[0.25, 0.5, 1.0]),
]


@pytest.mark.parametrize("ramp", RAMPS, ids=lambda ramp: ramp.kind)
def test_it_rises_from_nothing_to_all(ramp: RampConfig) -> None:
    values = [fraction(ramp, step) for step in range(40)]
    assert values == sorted(values)
    assert values[-1] == 1.0
    assert all(value == 0 for value in values[: max(ramp.begin, 1)])
    assert [moves(ramp, step) for step in range(1, 40)] == [
        after > before for before, after in itertools.pairwise(values)
    ]


def test_where_it_stands() -> None:
    linear, cubic, steps = RAMPS[1:]
    assert [fraction(linear, step) for step in (5, 8, 9, 12, 13, 24, 25)] == [0, 0, 0.2, 0.2, 0.4, 0.8, 1]
    assert [fraction(cubic, step) for step in (4, 5, 20)] == [0, 1 - (1 - 5 / 21) ** 3, 1 - (1 - 20 / 21) ** 3]
    assert fraction(cubic, 21) == 1  # the end counts, whatever `every` is
    assert [fraction(steps, step) for step in (2, 3, 9, 10, 12)] == [0, 0.25, 0.25, 0.5, 1]
    assert fraction(RampConfig("constant"), 0) == 1
    assert moves(RampConfig("constant"), 0)
    assert not moves(RampConfig("constant"), 1)
