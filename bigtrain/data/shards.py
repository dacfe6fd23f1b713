"""Token shards on disk: what `prepare` left behind, and reading it as one long memory-mapped array per split.

A prepared directory holds meta.json, tokenizer.json and `train-00000.bin`, `held_out-00000.bin` ...: token ids, little
endian uint16 (uint32 above 65,536 ids), nothing else. Each document is <eos> + its tokens, one after another; for a
causal model whose tokenizer has a <bos> of its own, <eos> <bos> + its tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.errors import ConfigError

FORMAT = 1  # raise it when the same corpus would give other bytes
SPLITS = ("train", "held_out")
META = "meta.json"


@dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on. The dictionaries are keyed by split: "train", "held_out".

    `tokens` counts what begins each document, `bytes` is UTF-8 text, `gzip_bits_per_byte` is of the held-out
    documents, each compressed alone with gzip -9 (a document over 1 MiB in parts of that size); None without any.
    """

    directory: Path
    fingerprint: str
    vocab_size: int
    eos_id: int
    tokens: dict[str, int]
    bytes: dict[str, int]
    documents: dict[str, int]
    gzip_bits_per_byte: float | None
    shards: dict[str, list[int]]  # tokens in each shard file
    blank_rows: int = 0  # that have no text and were left out
    left_out: dict[str, Any] = field(default_factory=dict)  # files that were: bigtrain.data.left_out

    @property
    def tokenizer_file(self) -> Path:
        return self.directory / "tokenizer.json"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_path(directory: Path, split: str, number: int) -> Path:
    return directory / f"{split}-{number:05d}.bin"


def load_prepared(directory: str | Path) -> Prepared:
    """Read back what `prepare` wrote, and see that every shard is whole. Raises ConfigError if one is not."""
    directory = Path(directory)
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        if meta.pop("format") != FORMAT:
            raise ValueError("another version's format")
        prepared = Prepared(directory=directory, **meta)
        itemsize = token_dtype(prepared.vocab_size).itemsize
        for split in SPLITS:
            for number, tokens in enumerate(prepared.shards[split]):
                path = shard_path(directory, split, number)
                if path.stat().st_size != tokens * itemsize:
                    raise ValueError(f"{path.name} is not {tokens * itemsize} bytes long")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "data.prepared_dir", str(directory), f"no whole prepared corpus ({reason})", "delete it and prepare again"
        ) from None
    return prepared


class TokenShards:
    """One split as one array of `len()` tokens; nothing is read before it is asked for."""

    def __init__(self, prepared: Prepared, split: str) -> None:
        counts = prepared.shards[split]
        dtype = token_dtype(prepared.vocab_size)
        # asarray: slicing a bare ndarray is several times cheaper than slicing a memmap
        self._maps = [
            np.asarray(np.memmap(shard_path(prepared.directory, split, number), dtype=dtype, mode="r", shape=(count,)))
            for number, count in enumerate(counts)
        ]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def window(self, start: int, length: int) -> NDArray[Any]:
        """Tokens [start, start + length), across shard files where need be; fewer only at the end of the split."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while length > 0 and shard < len(self._maps):
            offset = start - (int(self._ends[shard]) - len(self._maps[shard]))
            part = self._maps[shard][offset : offset + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)
