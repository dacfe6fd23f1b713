"""How long the labelled examples of a run are, padding counted, from its prepared data.

A batch is padded to its longest example, which is often a fraction of what the model takes: planned at full length a
step would take several times what it does.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bigtrain.config import LABELLED_TASKS, Config, HuggingFaceConfig
from bigtrain.errors import BigtrainError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigtrain.data.examples import Examples


@dataclass(frozen=True)
class Lengths:
    """Of batches in tokens a text, padding counted; of a source and its target the mean of both."""

    typical: int  # mean over batches
    longest: int
    longest_held_out: int
    distinct: int  # lengths that are padded to


def located(config: Config) -> Config:
    """`config` with data.prepared_dir, where a labelled task's data has been prepared on this machine."""
    if not isinstance(config.task, LABELLED_TASKS) or isinstance(config.model, HuggingFaceConfig):
        return config
    if config.data.prepared_dir is not None:
        return config
    from bigtrain.data.prepare_examples import prepared_before

    with suppress(BigtrainError, OSError):  # what is wrong with the data `train` says
        if (directory := prepared_before(config)) is not None:
            return replace(config, data=replace(config.data, prepared_dir=str(directory)))
    return config


def of(config: Config) -> Lengths | None:
    """None for what is no labelled task, whose sequences are all full, and where the data is not prepared."""
    directory = config.data.prepared_dir
    if directory is None or not isinstance(config.task, LABELLED_TASKS):
        return None
    return _measured(directory, config.model.max_seq_len, config.train.seed, config.train.global_batch)


def unknown(config: Config) -> bool:
    """Whether examples are planned at full length because their data is not prepared here."""
    return isinstance(config.task, LABELLED_TASKS) and of(config) is None


@lru_cache(maxsize=64)
def _measured(directory: str, limit: int, seed: int, global_batch: int) -> Lengths | None:
    """Of the batches of the first steps, as the loader makes them (data/example_loader.py)."""
    import numpy as np

    from bigtrain.data.examples import Examples, load_examples
    from bigtrain.data.sampler import by_length, padded

    try:
        prepared = load_examples(directory)
        train, held_out = (Examples(prepared, split) for split in ("train", "held_out"))
        if not len(train) or not len(held_out):
            return None
        fields = ["tokens", *(name for name in prepared.ragged if name == "target")]
        order = by_length(train.lengths(), seed, 0, global_batch)
        of_train = [_texts(train, field) for field in fields]
    except (BigtrainError, OSError):
        return None
    batches = np.mean([[padded(int(each), limit) for each in lengths[order].max(1)] for lengths in of_train], axis=0)
    distinct = {padded(int(each), limit) for lengths in of_train for each in np.unique(lengths)}

    def longest(texts: list[NDArray[Any]]) -> int:
        return round(float(np.mean([padded(int(lengths.max()), limit) for lengths in texts])))

    return Lengths(
        typical=max(1, round(float(batches.mean()))),
        longest=longest(of_train),
        longest_held_out=longest([_texts(held_out, field) for field in fields]),
        distinct=len(distinct),
    )


def _texts(examples: Examples, field: str) -> NDArray[Any]:
    """Tokens of each text; of a target the first is only read and the last only predicted."""
    return examples.lengths(field) - (field == "target")
