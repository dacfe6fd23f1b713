"""Numbers with units for people: the unit is chosen so that nothing that is not zero is shown as zero.

A plan of a cluster has terabytes and months in it, one of a laptop kilobytes and thousandths of a cent.
"""

from __future__ import annotations

Units = tuple[tuple[float, str], ...]  # (how many of the given unit it is, its name), the largest first

_BYTES: Units = ((1, "GiB"), (2**-10, "MiB"), (2**-20, "KiB"), (2**-30, "B"))
_SENT: Units = ((1, "GB"), (1e-3, "MB"), (1e-6, "kB"), (1e-9, "B"))
_SECONDS: Units = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))
_HOURS: Units = ((1, "h"), (1 / 60, "min"), *((factor / 3600, name) for factor, name in _SECONDS))
_ENERGY: Units = ((1, "kWh"), (1e-3, "Wh"), (1e-6, "mWh"))
_MASS: Units = ((1, "kg"), (1e-3, "g"), (1e-6, "mg"))


def size(gib: float) -> str:
    """Of memory and files, in GiB or less."""
    for factor, name in _BYTES[:-1]:
        if abs(gib) >= factor * 0.9995:
            return f"{gib / factor:,.1f} {name}"
    return _scaled(gib, _BYTES)


def sent(gb: float) -> str:
    """Over a link, in GB or less."""
    return _scaled(gb, _SENT)


def seconds(value: float) -> str:
    return _scaled(value, _SECONDS)


def hours(value: float) -> str:
    return _scaled(value, _HOURS)


def axis_of_hours(most: float) -> tuple[str, float]:
    """(unit of an axis that ends at so many hours, hours in one of it)."""
    for unit, its_hours in (("days", 24.0), ("hours", 1.0), ("minutes", 1 / 60), ("seconds", 1 / 3600)):
        if most >= 2 * its_hours:
            return unit, its_hours
    return "milliseconds", 1 / 3.6e6


def energy(kwh: float) -> str:
    return _scaled(kwh, _ENERGY)


def mass(kg: float) -> str:
    return _scaled(kg, _MASS)


def dollars(value: float) -> str:
    """US dollars, below one in cents."""
    if value == 0:
        return "$0"
    if value >= 1000:
        return f"${value:,.0f}"
    return f"${value:,.2f}" if value >= 1 else f"{number(100 * value)} cents"


def percent(share: float) -> str:
    return f"{share:.1%}" if abs(share) >= 0.001 or share == 0 else f"{100 * share:.2g}%"


def number(value: float) -> str:
    """Three digits or more, and all those before the point."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 9.995 else f"{value:.2f}" if magnitude >= 0.9995 else f"{value:.3g}"


def _scaled(value: float, units: Units) -> str:
    name = units[-1][1]
    for factor, name in units:
        if abs(value) >= factor * 0.9995:
            return f"{number(value / factor)} {name}"
    return f"{number(value / units[-1][0])} {name}" if value else f"0 {units[0][1]}"
