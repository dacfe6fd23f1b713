"""Labelled examples from files, a Hugging Face dataset or the standard library, each already train or held-out.

The split: a second source (data.held_out_path) is the held-out part; without one a record falls out by a hash of its
text, so that duplicates fall on the same side, on every machine. Questions fall by their context: what is asked in
training of a paragraph would give away what is asked of it afterwards.

Memory: one record, and the first rows of a file, at a time. `fields` says what a record is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Protocol

from bigtrain.config import LabelledDataConfig, StdlibDataConfig
from bigtrain.data import conll, hub, squad
from bigtrain.data.corpus import digest_of, find, hashed, shown
from bigtrain.data.fields import FIELDS, GAP, Field, known_names, record, resolve, same_label
from bigtrain.data.formats import SourceFile, decompressed, kind_of, lines, reading
from bigtrain.data.left_out import LeftOut
from bigtrain.data.tables import Row, hub_table, is_number, open_table
from bigtrain.errors import NO_VALUE, ConfigError
from bigtrain.files import printable

__all__ = ["FIELDS", "Field", "Records", "open_held_out", "open_records"]

FORMAT = 2  # raise it when the same files would give other records
CONLL = (".conll", ".bio", ".iob", ".iob2", ".txt")  # of tagging, as is .tsv
READABLE = "tsv, csv, jsonl, json or parquet"
MOST_LISTED = 20  # labels in a message
PARALLEL = "two text files, line by line: data.path=[FILE.en,FILE.de]"

Record = dict[str, Any]


@dataclass
class Records:
    """The labelled examples of one task, in a fixed order: iterating gives (record, held out).

    `source` reads them anew, each time from the beginning. Raises ConfigError, while it goes, at the first example
    that cannot be used, and at the end if one side of the split has none.
    """

    task: str
    held_out: float  # the fraction, 1.0 where training is over
    blame: tuple[str, object]  # the key, and its value, to name where there is nothing
    source: Callable[[], Iterable[tuple[Record, bool]]]
    parts: dict[str, Any] = field(repr=False)
    left_out: LeftOut = field(default_factory=LeftOut)  # files of a directory that are not read
    places: Callable[[], Iterable[str]] | None = None  # where each record stands, in the same order

    def place(self, number: int) -> str:
        """Where the record of that number (from 0) stands, for a message: its file and line, where there are such."""
        found = next(islice(self.places(), number, None), None) if self.places else None
        return found or f"record {number + 1}"

    def identity(self) -> dict[str, Any]:
        """What the records depend on, for a fingerprint: content, columns and the rule of the split, not the place."""
        return {"format": FORMAT, "task": self.task, "held_out": self.held_out, **self.parts}

    def __iter__(self) -> Iterator[tuple[Record, bool]]:
        counts = [0, 0]
        for example, held_out in self.source():
            counts[held_out] += 1
            yield example, held_out
        if not any(counts):
            raise ConfigError(*self.blame, "holds no record")
        if not all(counts) and self.held_out < 1:
            empty, way_out = ("held-out", "raise it") if counts[0] else ("training", "lower it")
            if counts[0] and "held_out_files" in self.parts and self.parts["held_out_files"]:
                raise ConfigError("data.held_out_path", NO_VALUE, "holds no record")
            raise ConfigError(
                "data.held_out", self.held_out, f"the {empty} part of {sum(counts)} records is empty",
                f"give more records or {way_out}",
            )  # fmt: skip


def open_records(data: LabelledDataConfig | StdlibDataConfig, task: str, cache: Path) -> Records:
    """Find and fingerprint the examples that `data` names, for one of the tasks of FIELDS.

    Raises ConfigError for a path that does not exist, cannot be read, or holds no file of labelled records.
    """
    if isinstance(data, StdlibDataConfig):
        from bigtrain.data import stdlib_records

        return stdlib_records.open_stdlib(data, task, cache)
    files, left_out = _files(data, "data.path", data.path, task)
    held_out_files, left_out_too = _files(data, "data.held_out_path", data.held_out_path, task)
    held_out_paths = {file.path.resolve() for file in held_out_files if file.stamp != hub.STAMP}
    files = [file for file in files if file.path.resolve() not in held_out_paths]
    if not files:
        raise ConfigError(
            "data.path",
            shown(data.path),
            f"holds no file of labelled records{left_out.also()}",
            f"wanted: {_wanted(task)}",
        )
    readers = _FileReader(data, task, hashed(files, cache), hashed(held_out_files, cache))
    blame = ("data.path", shown(data.path))
    left_out += left_out_too
    return Records(task, data.held_out, blame, readers.records, readers.parts(), left_out, readers.places)


def open_held_out(data: LabelledDataConfig, task: str, labels: list[str], cache: Path, key: str) -> Records:
    """The records of `data.path`, for one of the tasks of FIELDS, all of them held out; of a hub dataset the split that
    it keeps for that. `key` is the option that named them.

    Raises ConfigError as `open_records`; and while it goes, where `labels` are given, for a label that is none of them.
    """
    files, left_out = _files(data, key, data.path, task)
    if not files:
        raise ConfigError(key, shown(data.path), "holds no file of labelled records", f"wanted: {_wanted(task)}")
    readers = _FileReader(data, task, [], hashed(files, cache), labels)
    return Records(task, 1.0, (key, shown(data.path)), readers.records, readers.parts(), left_out, readers.places)


def _files(
    data: LabelledDataConfig, key: str, paths: str | list[str] | None, task: str
) -> tuple[list[SourceFile], LeftOut]:
    """The files that are read, and those that are not: of a directory those of a known format are; one named outright
    has to be of one."""
    given = [paths] if isinstance(paths, str) else paths or []
    outright = {Path(os.path.expanduser(path)) for path in given}
    found, left_out = find(data, key, given)
    known = []
    for file in found:
        if file.stamp == hub.STAMP or _kind(file, task, data) is not None:
            known.append(file)
        elif file.path in outright:
            raise file.error(f"of a format that holds no records of {task}", f"wanted: {_wanted(task)}")
        else:
            left_out.add(str(file.path), f"of a format that holds no records of {task}")
    if _parallel(data, task) and len(known) % 2:
        raise ConfigError(key, shown(paths), f"{len(known)} text files, they go by pairs", f"wanted: {PARALLEL}")
    return known, left_out


def _kind(file: SourceFile, task: str, data: LabelledDataConfig) -> str | None:
    kind, compression = kind_of(file.path.name)
    name = file.path.with_suffix("") if compression else file.path
    if task == "tagging" and (name.suffix.lower() in CONLL or (kind == "tsv" and not data.header)):
        return "conll"
    if kind == "text":
        return "parallel" if _parallel(data, task) else None
    return kind


def _parallel(data: LabelledDataConfig, task: str) -> bool:
    paths = [data.path] if isinstance(data.path, str) else data.path or []
    return task == "seq2seq" and not data.columns and len(paths) > 1 and all(kind_of(p)[0] == "text" for p in paths)


def _wanted(task: str) -> str:
    more = {
        "tagging": ", or token and tag lines as .conll, .bio, .txt",
        "question_answering": ", or SQuAD's .json",
        "seq2seq": f", or {PARALLEL}",
    }
    return READABLE + more.get(task, "")


class _FileReader:
    """Labelled files, or a hub dataset, as records with their split."""

    def __init__(
        self,
        data: LabelledDataConfig,
        task: str,
        files: list[SourceFile],
        held_out_files: list[SourceFile],
        labels: Sequence[str] = (),
    ) -> None:
        self.data, self.task, self.files, self.held_out_files = data, task, files, held_out_files
        self.labels = labels  # that there may be; empty: any

    def parts(self) -> dict[str, Any]:
        return {
            "files": [(file.name, file.digest) for file in self.files],
            "held_out_files": [(file.name, file.digest) for file in self.held_out_files],
            "columns": {name: str(column) for name, column in self.data.columns.items()},
            "header": self.data.header,
            "hub_config": self.data.name,
        }

    def places(self) -> Iterator[str]:
        return (f"{file.path}: {where}" for file, where, _, _ in self._all())

    def records(self) -> Iterator[tuple[Record, bool]]:
        checks: list[_Check] = []
        if self.task in ("classification", "tagging"):
            checks.append(_LabelCheck(self.task, self.labels))
        if self.task in ("classification", "regression"):
            checks.append(_PairCheck())
        for file, where, example, fixed in self._all():
            try:
                key = split_key(self.task, example)
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise file.error(f"{where} holds half a surrogate pair ({half!r}), which is no text") from None
            for check in checks:
                check.see(file, where, example, bool(fixed))
            yield example, digest_of(key) < self.data.held_out * 2**64 if fixed is None else fixed
        for check in checks:
            check.finish()

    def _all(self) -> Iterator[tuple[SourceFile, str, Record, bool | None]]:
        """(file, where in it, record, whether it is held out where the user says which are)."""
        for files, fixed in ((self.files, False if self.held_out_files else None), (self.held_out_files, True)):
            if _parallel(self.data, self.task) and files:
                found = chain.from_iterable(map(_parallel_lines, files[::2], files[1::2]))
            else:
                found = chain.from_iterable(self._file(file, bool(fixed)) for file in files)
            for file, where, example in found:
                yield file, where, example, fixed

    def _file(self, file: SourceFile, held_out: bool) -> Iterator[tuple[SourceFile, str, Record]]:
        if file.stamp == hub.STAMP:
            table = hub_table(file, self.data.name, held_out)
            columns = resolve(self.task, table, self.data.columns, file.path)
            yield from self._converted(file, table.rows, columns)
            return
        kind = _kind(file, self.task, self.data)
        given = {str(column).lower() for column in self.data.columns.values()}
        with reading(file) as raw:
            if kind == "conll":
                yield from self._sentences(file, raw)
            elif kind == "json" and self.task == "question_answering" and squad.is_squad(file, raw):
                columns = {"id": "id", "question": "question", "context": "context", "answers": "answers"}
                yield from self._converted(file, squad.rows(file, raw), columns)
            else:
                table = open_table(file, raw, str(kind), self.data.header, known_names(self.task) | given)
                if table.head:
                    columns = resolve(self.task, table, self.data.columns, file.path)
                    yield from self._converted(file, table.rows, columns)

    def _converted(
        self, file: SourceFile, rows: Iterable[Row], columns: dict[str, str]
    ) -> Iterator[tuple[SourceFile, str, Record]]:
        for where, row in rows:

            def fail(problem: str, way_out: str, where: str = where) -> ConfigError:
                return file.error(f"{where}: {problem}", way_out)

            yield file, where, record(self.task, row, columns, f"{printable(file.name)}:{where.split()[-1]}", fail)

    def _sentences(self, file: SourceFile, raw: Any) -> Iterator[tuple[SourceFile, str, Record]]:
        numbers = {"words": 0, "tags": -1}
        for name, column in self.data.columns.items():
            if name not in numbers or not str(column).isdigit():
                problem = f"{file.path} is in CoNLL layout, whose columns words and tags go by number"
                raise ConfigError(f"data.columns.{name}", column, problem, "as data.columns={words: 0, tags: 3}")
            numbers[name] = int(column)
        for line, words, tags in conll.sentences(file, lines(file, decompressed(file, raw)), **numbers):
            yield file, f"line {line}", {"words": words, "tags": [same_label(tag) for tag in tags]}


class _Check(Protocol):
    """What is wrong with a record only beside the others."""

    def see(self, file: SourceFile, where: str, example: Record, held_out: bool) -> None: ...

    def finish(self) -> None: ...


class _LabelCheck:
    """Raises ConfigError for a label that only held-out records have, where the user says which those are or `known`
    labels are given, and for a "nan" among numbers: that is a gap, among words it may be one (the language Min Nan)."""

    def __init__(self, task: str, known: Sequence[str]) -> None:
        self.task, self.given = task, bool(known)
        # By the spelling that is one in every format: an older run's labels may have another.
        self.known = {same_label(label): label for label in known}
        self.gap: ConfigError | None = None
        self.words = False

    def see(self, file: SourceFile, where: str, example: Record, held_out: bool) -> None:
        labels = example["tags"] if self.task == "tagging" else [example["label"]]
        for label in labels:
            if not is_number(label):
                self.words = True
            elif self.gap is None and not math.isfinite(float(label)):
                self.gap = file.error(f"{where}: the label is {label}, which is no label among numbers", GAP)
            if self.given or held_out:
                if label not in self.known:
                    problem = f"{where}: {label!r}: a label that no training example has"
                    raise file.error(problem, f"known are {listed(self.known.values())}")
            else:
                self.known[label] = label
        if self.given and self.task == "tagging":
            example["tags"] = [self.known[label] for label in labels]
        elif self.given:
            example["label"] = self.known[labels[0]]

    def finish(self) -> None:
        if self.gap is not None and not self.words:
            raise self.gap


class _PairCheck:
    """Raises ConfigError where some records have two texts and others one."""

    def __init__(self) -> None:
        self.pairs: bool | None = None

    def see(self, file: SourceFile, where: str, example: Record, held_out: bool) -> None:
        found = "text_pair" in example
        self.pairs = found if self.pairs is None else self.pairs
        if found != self.pairs:
            has, others = ("a", "have none") if found else ("no", "have one")
            raise file.error(
                f"{where} ({example['text'][:40]!r}) has {has} text_pair, those before it {others}",
                "give every record one, or take one text of each: data.columns={text: COLUMN}",
            )

    def finish(self) -> None:
        """Nothing is left to say."""


def listed(labels: Iterable[str]) -> str:
    """Labels for a message: the first of them, where they are many."""
    found = list(labels)
    return ", ".join(found[:MOST_LISTED]) + (f" and {len(found) - MOST_LISTED} more" * (len(found) > MOST_LISTED))


def _parallel_lines(source: SourceFile, target: SourceFile) -> Iterator[tuple[SourceFile, str, Record]]:
    with ExitStack() as stack:
        texts = [lines(file, decompressed(file, stack.enter_context(reading(file)))) for file in (source, target)]
        for number, pair in enumerate(zip_longest(*texts), start=1):
            if None in pair:
                counts = [
                    number - (line is None) + sum(1 for _ in text) for line, text in zip(pair, texts, strict=True)
                ]
                raise source.error(
                    f"has {counts[0]} lines, {target.path} has {counts[1]}",
                    "line by line one has to be the translation of the other",
                )
            example = {"source": pair[0].strip(), "target": pair[1].strip()}
            if any(example.values()):  # a line that is empty in both parts documents
                for file, text in zip((source, target), example.values(), strict=True):
                    if not text:
                        raise file.error(f"line {number} is empty", "remove it from both files")
                yield source, f"line {number}", example


def split_key(task: str, example: Record) -> bytes:
    """What the hash that splits is taken of. Raises UnicodeEncodeError where the text is none."""
    if task == "tagging":
        parts = example["words"]
    elif task == "question_answering":
        parts = [example["context"]]
    elif task == "seq2seq":
        parts = [example["source"]]
    elif task == "instruction":
        parts = [example["prompt"]] if "prompt" in example else [json.dumps(example["messages"], sort_keys=True)]
    else:
        parts = [example["text"], example.get("text_pair", "")]
    return "\0".join(parts).encode()
