"""The two kinds of failure a user sees, each as one line and a non-zero exit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BigtrainError(Exception):
    """Something the user can act on. The command prints it as one line, without a traceback.

    `exit_code` is the process's exit status: 1 for a run that failed.
    """

    exit_code = 1


class ConfigError(BigtrainError):
    """A value that cannot be used, found before any process starts: names the field, the value, the way out.

    Exit status 2, as command lines do for a wrong argument.
    """

    exit_code = 2

    def __init__(self, field: str, value: object, problem: str, way_out: str = "") -> None:
        self.field, self.value, self.problem, self.way_out = field, value, problem, way_out
        shown = "" if value is NO_VALUE else f"={value!r}" if isinstance(value, str) else f"={value}"
        super().__init__(f"{field}{shown}: {problem}" + (f"; {way_out}" if way_out else ""))


NO_VALUE = object()


def unknown_key(field: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that no dataclass field (or DeepSpeed option) has, with the nearest valid name."""
    prefix, _, key = field.rpartition(".")
    names = sorted(known)
    near = nearest(key, names)
    where = f" in {prefix}" if prefix else ""
    way_out = (
        f"did you mean {prefix + '.' if prefix else ''}{near}?" if near else f"valid keys{where}: {', '.join(names)}"
    )
    return ConfigError(field, NO_VALUE, "unknown key", way_out)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The closest of `names` to a mistyped `name`, or None if nothing is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return close[0] if close else None
