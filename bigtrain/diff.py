"""`bigtrain diff`: where two runs differ, in config, environment, data and curve. And how far, for other commands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigtrain.config import flatten
from bigtrain.errors import BigtrainError
from bigtrain.hooks.jsonl import read_metrics

CURVES = ("train/loss", "train/grad_norm", "eval/loss", "eval_sample/loss")
_EVERY_RUN_HAS_ITS_OWN = ("run_dir", "data.prepared_dir", "launch.master_port")
_EVERY_LAUNCH_HAS_ITS_OWN = ("BIGTRAIN_",)  # prefixes of environment variables
ABSENT = "(none)"


@dataclass(frozen=True)
class Curves:
    """One metric of two runs, over the steps that both have."""

    metric: str
    steps: int
    same_bits: int  # steps whose numbers are equal
    first_difference: int | None  # step
    largest: float  # relative difference: |a - b| / max(|a|, |b|)
    largest_at: int | None

    @property
    def identical(self) -> bool:
        return self.steps > 0 and self.same_bits == self.steps

    def __str__(self) -> str:
        if not self.steps:
            return f"{self.metric}: no step in common"
        if self.identical:
            return f"{self.metric}: the same bits at all {self.steps} steps"
        return (
            f"{self.metric}: the same bits at {self.same_bits} of {self.steps} steps, other ones from step"
            f" {self.first_difference} on; largest relative difference {self.largest:.2e} at step {self.largest_at}"
        )


def compare_curves(first: Path, second: Path, metric: str) -> Curves:
    """Of two run directories. A number that is not finite equals another such."""
    a, b = curve(first, metric), curve(second, metric)
    common = [step for step in a if step in b]
    differences = {step: _relative(a[step], b[step]) for step in common if a[step] != b[step]}
    worst = max(differences, key=lambda step: differences[step], default=None)
    return Curves(
        metric, len(common), len(common) - len(differences), min(differences, default=None),
        differences[worst] if worst is not None else 0.0, worst,
    )  # fmt: skip


def curve(run: Path, metric: str) -> dict[int, float | None]:
    """{step: value} of metrics.jsonl; None for a number that was not finite."""
    return {row["step"]: row[metric] for row in read_metrics(run / "metrics.jsonl") if metric in row}


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return float("inf")
    return abs(a - b) / max(abs(a), abs(b))


# ---------------------------------------------------------------------------------------------- what differs


def diff(first: Path, second: Path) -> list[str]:
    """Lines for a person: only what differs, section by section. Raises BigtrainError where a directory is no run."""
    lines: list[str] = []
    configs = read_config(first), read_config(second)
    launches = read_launch(first), read_launch(second)
    lines += _section("config", *(_without_own(flatten(config)) for config in configs))
    lines += _section("code and libraries", *map(_made_with, launches))
    lines += _section("machine and placement", *map(_placed, launches))
    lines += _section("data", *(_data(run, config) for run, config in zip((first, second), configs, strict=True)))
    lines.append("curves")
    lines += [f"  {found}" for found in (compare_curves(first, second, metric) for metric in CURVES) if found.steps]
    if lines[-1] == "curves":
        lines.append("  no step in common")
    return lines


def _section(title: str, first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    changed = differences(first, second)
    if not changed:
        return [f"{title}: the same"]
    width = max(map(len, changed))
    return [title, *(f"  {name:{width}}  {_shown(a)} -> {_shown(b)}" for name, (a, b) in changed.items())]


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (value here, value there)} where they differ, in the order of the keys."""
    pairs = {key: (first.get(key, ABSENT), second.get(key, ABSENT)) for key in {**first, **second}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_config(run: Path) -> dict[str, Any]:
    """The run's config.yaml as plain data, of an older schema too. Raises BigtrainError without one."""
    try:
        data = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BigtrainError(f"{run}: is no run: its config.yaml cannot be read ({type(error).__name__})") from None
    if not isinstance(data, dict):
        raise BigtrainError(f"{run}: is no run: its config.yaml holds no config")
    return data


def read_launch(run: Path) -> dict[str, Any]:
    """launch.json: how the run was last started. Empty if it is not there or broken."""
    try:
        data = json.loads((run / "launch.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _without_own(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _EVERY_RUN_HAS_ITS_OWN}


def _made_with(launch: dict[str, Any]) -> dict[str, Any]:
    code = launch.get("code_sha256")
    return ({"bigtrain's sources": f"{code[:12]}..."} if code else {}) | launch.get("versions", {})


def _placed(launch: dict[str, Any]) -> dict[str, Any]:
    environment = {
        f"environment.{name}": value
        for name, value in launch.get("environment", {}).items()
        if not name.startswith(_EVERY_LAUNCH_HAS_ITS_OWN)
    }
    host = {"host": launch["host"]} if "host" in launch else {}
    return host | flatten(launch.get("placement", {}), "placement.") | environment


def _data(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    prepared = (config.get("data") or {}).get("prepared_dir")
    found = {"fingerprint of corpus and tokenizer": Path(prepared).name} if prepared else {}
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return found
    return found | {key: value for key, value in result.items() if key.startswith("data/")}
