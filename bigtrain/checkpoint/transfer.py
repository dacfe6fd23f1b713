"""`init_from`: weights of another run or of a Hugging Face directory. All must fit but a task's head and pooler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bigtrain.checkpoint.find import candidates
from bigtrain.checkpoint.weights import Report, iterate_weights, load_matching, reads
from bigtrain.errors import BigtrainError
from bigtrain.models import huggingface

SHOWN = 6  # names in a line
RECORD = "initial_weights.json"  # in the run directory: all names
HEADS = ("head.", "pair_head.", "backbone.pooler.")  # of our encoders: a task may need others than a file has


def load_initial(model: nn.Module, source: str, new_heads: bool = True) -> Report:
    """Load a run, a checkpoint or a Hugging Face directory, on all ranks together.

    With `new_heads` those parameters may begin anew that belong to the task and not to the model: a classifier, a
    pooler. Raises BigtrainError where any other does not fit, ConfigError if there are no weights that can be read.
    A model on the meta device is only compared: names and shapes, and no bytes are read.
    """
    report = load_matching(model, _tensors(model, source))
    if not report.loaded:
        name, why = next(iter(report.skipped.items()), ("nothing", "the file is empty"))
        raise BigtrainError(f"init_from={source}: nothing fits this model ({name}: {why}); is model=... the same?")
    check_fit(model, report, f"init_from={source}", new_heads)
    return report


def _tensors(model: nn.Module, source: str) -> Iterator[tuple[str, Tensor]]:
    path, read = Path(source), reads(model)
    if is_huggingface(path) and is_transformers(model):
        from bigtrain.models.huggingface import auto

        return auto.iterate_weights(model, path, read)  # type: ignore[arg-type]
    if is_huggingface(path):
        return huggingface.iterate_weights(path, huggingface.read_config(path), read=read)
    return iterate_weights(candidates(path, source)[0], read)


def check_fit(model: nn.Module, report: Report, source: str, new_heads: bool = True) -> None:
    """Raises BigtrainError naming the first parameter that has not been loaded, unless it is of a head or a pooler,
    `new_heads` is set, and nothing else of that head has been."""
    loaded = {_head(model, name) for name in report.loaded}
    for name in report.new:
        head = _head(model, name) if new_heads else None
        if head is not None and (head not in loaded or name in report.skipped):
            continue
        if (why := report.skipped.get(name)) is not None:
            problem = f"parameter {name} is {why}"
            way_out = "correct its config.json, or take its shape with model=pretrained"
        elif head is not None:
            problem, way_out = f"has no {name}, though it has others of that head", "complete or remove them"
        else:
            problem, way_out = f"has no weights for {name}, which this model needs", "is model=... the same?"
        raise BigtrainError(f"{source}: {problem}; {way_out}")


def _head(model: nn.Module, name: str) -> str | None:
    """The head or pooler that a parameter belongs to; None of the model itself, as are the outputs of what writes."""
    if is_transformers(model):
        return model.head_of(name)  # type: ignore[operator,no-any-return]
    if not hasattr(model, "backbone"):
        return None
    return next((head for head in HEADS if name.startswith(head)), None)


def is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file()


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is one of transformers in our wrapping; asked without importing transformers."""
    return hasattr(model, "block_names")


def described(report: Report, source: str) -> str:
    """One line: how much was loaded, what was left out and what begins anew."""
    parts = [f"weights from {source}: {len(report.loaded)} tensors"]
    if report.skipped:
        shown = _some([f"{name} ({why})" for name, why in report.skipped.items()])
        parts.append(f"{len(report.skipped)} not used: {shown}")
    if report.new:
        parts.append(f"{len(report.new)} new: {_some(report.new)}")
    return "; ".join(parts)


def record(report: Report, source: str) -> dict[str, Any]:
    """What RECORD holds: `described` with every name."""
    return {"init_from": source} | asdict(report)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more ({RECORD})" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
