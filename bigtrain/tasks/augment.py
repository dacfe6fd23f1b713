"""Augmentation of a text without a dictionary: its own tokens change places, go, or become the unknown token.

Swap and deletion are two of the four operations of "EDA" (Wei and Zou 2019, arXiv 1901.11196), the third is word
dropout (Iyyer et al. 2015). What marks the text's parts (special tokens) stays, and no token leaves its text.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import ClassificationConfig
from bigtrain.data.example_loader import Rows


def augmented(
    rows: Rows, config: ClassificationConfig, special: Collection[int], unknown: int, random: np.random.Generator
) -> Rows:
    """Rows with `tokens` (T,) and where there are two texts `token_types` (T,), changed as task.token_* ask for."""
    if not (config.token_swap or config.token_deletion or config.token_dropout):
        return rows
    return [row | _changed(row, config, np.array(sorted(special)), unknown, random) for row in rows]


def _changed(
    row: dict[str, NDArray[Any]],
    config: ClassificationConfig,
    special: NDArray[Any],
    unknown: int,
    random: np.random.Generator,
) -> dict[str, NDArray[Any]]:
    tokens = np.array(row["tokens"])  # a copy: the row is a view of the file
    own = ~np.isin(tokens, special)
    text = np.array(row.get("token_types", np.zeros_like(tokens)))
    if config.token_swap:
        chosen = own & (random.random(len(tokens)) < config.token_swap)
        for number in np.unique(text[chosen]):
            places = np.flatnonzero(chosen & (text == number))
            tokens[places] = tokens[random.permutation(places)]
    if config.token_dropout:
        tokens[own & (random.random(len(tokens)) < config.token_dropout)] = unknown
    kept = np.ones(len(tokens), dtype=bool)
    if config.token_deletion:
        kept = ~own | (random.random(len(tokens)) >= config.token_deletion)
        for number in np.unique(text[own]):  # a text of which nothing is left would say nothing of its label
            places = np.flatnonzero(own & (text == number))
            if not kept[places].any():
                kept[random.choice(places)] = True
    changed = {"tokens": tokens[kept]}
    return changed | ({"token_types": text[kept]} if "token_types" in row else {})
