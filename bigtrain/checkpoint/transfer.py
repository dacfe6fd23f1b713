"""`init_from`: weights of another run or of a Hugging Face directory, as far as they fit."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bigtrain.checkpoint.find import candidates
from bigtrain.checkpoint.weights import Report, iterate_weights, load_matching, reads
from bigtrain.errors import BigtrainError
from bigtrain.models import huggingface

SHOWN = 4  # names in a line


def load_initial(model: nn.Module, source: str) -> Report:
    """Load what fits by name and shape from a run, a checkpoint or a Hugging Face directory, on all ranks together.

    Raises BigtrainError if nothing does, ConfigError if there are no weights that can be read.
    """
    path = Path(source)
    if is_huggingface(path) and is_transformers(model):
        from bigtrain.models.huggingface import auto

        tensors = auto.iterate_weights(model, path, reads(model))  # type: ignore[arg-type]
    elif is_huggingface(path):
        tensors = huggingface.iterate_weights(path, huggingface.read_config(path), read=reads(model))
    else:
        tensors = iterate_weights(candidates(path, source)[0], reads(model))
    report = load_matching(model, tensors)
    if not report.loaded:
        name, why = next(iter(report.skipped.items()), ("nothing", "the file is empty"))
        raise BigtrainError(f"init_from={source}: nothing fits this model ({name}: {why}); is model=... the same?")
    return report


def is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file()


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is one of transformers in our wrapping; asked without importing transformers."""
    return hasattr(model, "block_names")


def described(report: Report, source: str) -> str:
    """One line: how much was loaded, what was left and what begins anew."""
    parts = [f"weights from {source}: {len(report.loaded)} tensors"]
    if report.skipped:
        parts.append(f"not used: {_some([f'{name} ({why})' for name, why in report.skipped.items()])}")
    if report.new:
        parts.append(f"new: {_some(report.new)}")
    return "; ".join(parts)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
