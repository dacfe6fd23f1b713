"""What a run was made with: the code by its hash, the libraries by their versions. Neither torch nor Hydra here."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("bigtrain", "torch", "deepspeed", "accelerate", "transformers", "tokenizers")
SOURCES = (".py", ".c", ".json")  # what a run executes or reads of this package; conf/ is in the run's config.yaml


def code_sha256(package: Path = Path(__file__).parent) -> str:
    """SHA-256 over the names and contents of bigtrain's own source files, wherever it is installed."""
    whole = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package)
        if path.suffix in SOURCES and path.is_file() and name.parts[0] != "conf":
            whole.update(f"{name.as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def versions() -> dict[str, str]:
    """Of Python, of bigtrain and of the libraries that bear on the numbers, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def differences(made_with: Mapping[str, Mapping[str, str]]) -> str:
    """A table of what is not the same on all of them, a column each; empty if everything is."""
    names = dict.fromkeys(name for each in made_with.values() for name in each)
    rows = [
        [name, *(each.get(name, "-") for each in made_with.values())]
        for name in names
        if len({each.get(name) for each in made_with.values()}) > 1
    ]
    if not rows:
        return ""
    rows.insert(0, ["", *made_with])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip
