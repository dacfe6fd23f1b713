"""Labelled examples on disk: what `prepare_examples` left behind, and reading one at a time from memory-mapped arrays.

A prepared directory holds meta.json, tokenizer.json and for each split and field `train.tokens.bin` (int32, or float32
for a number to predict), with `train.tokens.ends.bin` (int64) where an example has several values of a field. The field
`record` numbers the record that an example is of, in its split: a long record may be several examples.
`held_out.records.jsonl` has the held-out records as they were given, for a table of predictions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.shards import META, SPLITS
from bigtrain.errors import ConfigError

FORMAT = 2  # of the files: raise it when those of before cannot be read any more
ENCODING = 3  # raise it when the same records would give other examples
RECORDS = "held_out.records.jsonl"
Example = dict[str, Any]  # field -> a list of numbers, or one number


@dataclass(frozen=True)
class PreparedExamples:
    """Examples of one task, encoded by one tokenizer. `special_ids`: pad, cls, sep, mask and unk where there are such.

    `labels` in the order of their ids, empty where there are none; `ragged` fields have several values an example, the
    `single` ones one. `cut` counts examples that were longer than the model's sequences.
    """

    directory: Path
    fingerprint: str
    task: str
    vocab_size: int
    special_ids: dict[str, int]
    labels: list[str]
    examples: dict[str, int]  # by split
    ragged: dict[str, str]  # field -> dtype
    single: dict[str, str]
    cut: int
    notes: list[str] = field(default_factory=list)  # what was lost or left out, and what a user should know
    left_out: dict[str, Any] = field(default_factory=dict)  # files that were not read: bigtrain.data.left_out

    @property
    def tokenizer_file(self) -> Path:
        return self.directory / "tokenizer.json"

    def held_out_records(self) -> Iterator[dict[str, Any]]:
        """The held-out records, in the order of their numbers."""
        with open(self.directory / RECORDS, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def load_examples(directory: str | Path) -> PreparedExamples:
    """Read back what `prepare_examples` wrote. Raises ConfigError if it is not whole."""
    directory = Path(directory)
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        if meta.pop("examples_format") != FORMAT:
            raise ValueError("another version's format")
        prepared = PreparedExamples(directory=directory, **meta)
        for split in SPLITS:
            Examples(prepared, split)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "data.prepared_dir", str(directory), f"no whole prepared examples ({reason})", "delete it and prepare again"
        ) from None
    return prepared


class Examples:
    """One split's examples; nothing is read before it is asked for. Raises ValueError if a file is not whole."""

    def __init__(self, prepared: PreparedExamples, split: str) -> None:
        self._n = prepared.examples[split]
        self._single = {
            name: _mapped(prepared.directory / f"{split}.{name}.bin", dtype, self._n)
            for name, dtype in prepared.single.items()
            if self._n
        }
        self._ragged = {}
        for name, dtype in prepared.ragged.items() if self._n else ():
            ends = _mapped(prepared.directory / f"{split}.{name}.ends.bin", "<i8", self._n)
            total = int(ends[-1]) if self._n else 0
            self._ragged[name] = (_mapped(prepared.directory / f"{split}.{name}.bin", dtype, total), ends)

    def __len__(self) -> int:
        return self._n

    def lengths(self, field: str = "tokens") -> NDArray[np.int64]:
        """How many values of `field` each example has."""
        _, ends = self._ragged[field]
        return np.diff(ends, prepend=0)

    def records(self) -> NDArray[np.int32]:
        """The number of each example's record, in ascending order."""
        return self._single["record"]

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        found = {name: values[index] for name, values in self._single.items()}
        for name, (values, ends) in self._ragged.items():
            found[name] = values[ends[index - 1] if index else 0 : ends[index]]
        return found


def _mapped(path: Path, dtype: str, count: int) -> NDArray[Any]:
    if path.stat().st_size != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{path.name} has not {count} values")
    if not count:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))


class ExampleWriter:
    """Writes one split's examples, one after another, into `directory`."""

    def __init__(self, directory: Path, split: str) -> None:
        self._directory, self._split = directory, split
        self._files: dict[str, Any] = {}
        self._ends: dict[str, int] = {}
        self.ragged: dict[str, str] = {}
        self.single: dict[str, str] = {}
        self.count = 0

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def add(self, example: Example) -> None:
        """Every example has the same fields."""
        for name, value in example.items():
            several = isinstance(value, list)
            dtype = "<f4" if isinstance(value, float) else "<i4"
            (self.ragged if several else self.single).setdefault(name, dtype)
            self._file(f"{name}.bin").write(np.asarray(value, dtype=dtype).tobytes())
            if several:
                self._ends[name] = self._ends.get(name, 0) + len(value)
                self._file(f"{name}.ends.bin").write(np.asarray(self._ends[name], dtype="<i8").tobytes())
        self.count += 1

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = open(self._directory / f"{self._split}.{name}", "wb")  # noqa: SIM115  (closed at exit)
        return self._files[name]
