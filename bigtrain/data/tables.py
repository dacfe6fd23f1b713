"""Tables of labelled rows: tsv, csv, jsonl, json, parquet and hub datasets, each row with its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, BinaryIO

from bigtrain.data.delimited import cells, checked, column_names
from bigtrain.data.formats import SourceFile, decompressed, json_rows, jsonl, parquet_rows
from bigtrain.errors import BigtrainError, ConfigError

PEEK_ROWS = 256  # read ahead to find out about header and columns

Row = tuple[str, dict[str, Any]]  # where it stands ("line 3"), its cells by column name


@dataclass(frozen=True)
class Table:
    """`head` holds the first rows, which `rows` gives again. Without a header columns are named "0", "1", ..."""

    names: list[str]
    header: bool
    head: list[dict[str, Any]]
    rows: Iterator[Row]


def open_table(file: SourceFile, raw: BinaryIO, kind: str, header: bool | None, known: Iterable[str]) -> Table:
    """The rows of one file of the kind that formats.kind_of tells; `known` are column names that suggest a header.

    Raises ConfigError, at once or while rows are read, for a line that is no row of this table.
    """
    if kind in ("tsv", "csv"):
        return _delimited(file, raw, kind, header, set(known))
    if kind == "parquet":
        names: list[str] = []

        def all_columns(found: list[str]) -> list[str]:
            names.extend(found)
            return found

        rows = ((f"row {number}", row) for number, row in enumerate(parquet_rows(file, raw, all_columns), start=1))
        return _named(rows, names)
    read, unit = (jsonl, "line") if kind == "jsonl" else (json_rows, "row")
    return _named(_objects(file, read(file, decompressed(file, raw)), unit), [])


def hub_table(file: SourceFile, config_name: str | None, held_out: bool) -> Table:
    """A hub dataset's train split, or the split that it keeps for validation. Class numbers become their names."""
    import datasets

    try:
        revision = file.digest or None
        splits = datasets.load_dataset(str(file.path), config_name, streaming=True, revision=revision)
        wanted = ("validation", "dev", "test") if held_out else ("train",)
        split = next((split for split in wanted if split in splits), None)
        if split is None:
            raise file.error(f"the dataset has no split {wanted[0]}", f"there are: {', '.join(splits)}")
        stream = splits[split]
        features = stream.features or {}
        decoders = {name: decoder for name in features if (decoder := _class_names(features[name])) is not None}
        rows = _hub_rows(file, stream, decoders)
        return _named(rows, list(features))
    except BigtrainError:
        raise
    except Exception as error:  # whatever a loader or the network raises: the user needs its first line
        raise _unreadable(file, error) from None


def _hub_rows(file: SourceFile, stream: Any, decoders: dict[str, Callable[[Any], Any]]) -> Iterator[Row]:
    try:
        for number, row in enumerate(stream, start=1):
            for name, decode in decoders.items():
                row[name] = decode(row[name])
            yield f"row {number}", row
    except BigtrainError:
        raise
    except Exception as error:
        raise _unreadable(file, error) from None


def _unreadable(file: SourceFile, error: Exception) -> ConfigError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return file.error(f"the dataset cannot be read ({reason})")


def _class_names(feature: Any) -> Callable[[Any], Any] | None:
    """What turns a datasets.ClassLabel, or a list of them, from numbers into names; None for any other feature."""
    inner = getattr(feature, "feature", None)
    if inner is not None and (name := _class_names(inner)) is not None:
        return lambda values: [name(value) for value in values]
    names = getattr(feature, "names", None)
    if not names:
        return None
    # -1 stands for "not labelled" in published test splits: it stays what it is
    return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _named(rows: Iterator[Row], names: list[str]) -> Table:
    head = list(islice(rows, PEEK_ROWS))
    found = dict.fromkeys(chain(names, *(row for _, row in head)))
    return Table([str(name) for name in found], True, [row for _, row in head], chain(head, rows))


def _objects(file: SourceFile, values: Iterable[tuple[int, Any]], unit: str) -> Iterator[Row]:
    for number, value in values:
        if not isinstance(value, dict):
            raise file.error(f"{unit} {number} is {type(value).__name__}, not an object with named columns")
        yield f"{unit} {number}", value


# -------------------------------------------------------------------------------------------------- tsv, csv


def _delimited(file: SourceFile, raw: BinaryIO, kind: str, header: bool | None, known: set[str]) -> Table:
    numbered = cells(file, raw, kind)
    head = list(islice(numbered, PEEK_ROWS))
    if not head:
        return Table([], False, [], iter(()))
    found = [row for _, row in head]
    has_header = header if header is not None else looks_like_header(found, known)
    names = column_names(file, head[0]) if has_header else [str(number) for number in range(len(found[0]))]
    head = head[1:] if has_header else head
    rows = checked(file, chain(head, numbered), len(names))
    peeked = [dict(zip(names, row, strict=False)) for _, row in head]
    return Table(
        names, has_header, peeked, ((f"line {line}", dict(zip(names, row, strict=True))) for line, row in rows)
    )


def looks_like_header(rows: list[list[str]], known: set[str]) -> bool:
    """Whether the first of these rows (PEEK_ROWS at most) names the columns.

    It does if its cells are short names that never come again in their columns, and one of them is `known`, or stands
    over a column of numbers, or stands over a column of few values of which it is none.
    """
    first, rest = [cell.strip() for cell in rows[0]], [row for row in rows[1:] if len(row) == len(rows[0])]
    if not any(first) or not all(re.fullmatch(r"|[^\W\d][\w .#()/-]{0,40}", cell) for cell in first):
        return False
    columns = list(zip(*rest, strict=True)) if rest else [() for _ in first]
    if any(name in column for name, column in zip(first, columns, strict=True) if name):
        return False
    if any(name.lower() in known for name in first):
        return True
    numbers = any(column and all(is_number(cell) for cell in column) for column in columns)
    few = len(rest) >= 20 and any(len(set(column)) <= len(rest) // 4 for column in columns)
    return numbers or few


def is_number(cell: object) -> bool:
    try:
        float(str(cell))
    except ValueError:
        return False
    return True
