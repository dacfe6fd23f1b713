"""No number that is not zero is shown as zero."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from bigtrain.plan import units

SHOWN = [units.size, units.sent, units.seconds, units.hours, units.energy, units.mass, units.dollars, units.percent]


@pytest.mark.parametrize("shown", SHOWN)
def test_nothing_is_shown_as_zero_that_is_not(shown: Callable[[float], str]) -> None:
    for power in range(-12, 7):
        for digits in (1.0, 4.44, 9.99):
            assert re.search("[1-9]", shown(digits * 10.0**power)), (shown.__name__, digits, power)
    assert not re.search("[1-9]", shown(0.0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.size(80), "80.0 GiB"), (units.size(0.5), "512.0 MiB"), (units.size(0.99999), "1.0 GiB"),
        (units.sent(2.5e-4), "250 kB"), (units.seconds(0.0045), "4.50 ms"), (units.hours(0.4), "24.0 min"),
        (units.hours(7.28e-5), "262 ms"), (units.energy(1.23e-4), "123 mWh"), (units.dollars(0.05), "5.00 cents"),
        (units.dollars(12345.6), "$12,346"), (units.dollars(3.456), "$3.46"), (units.percent(0.3321), "33.2%"),
        (units.percent(2e-5), "0.002%"),
    ],
)  # fmt: skip
def test_the_unit_is_that_of_the_number(text: str, expected: str) -> None:
    assert text == expected
