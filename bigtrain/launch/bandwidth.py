"""All-reduce between two nodes, measured."""

from __future__ import annotations

from typing import Any


def start(environment: dict[str, str], device: str, sizes: list[int], tests: dict[str, Any]) -> dict[str, Any]:
    return {}


def collect(tests: dict[str, Any]) -> dict[str, Any] | None:
    return None
