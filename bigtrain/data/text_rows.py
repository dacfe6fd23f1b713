"""The documents of a row format: the text column of each row of a jsonl, json, csv, tsv or parquet file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from bigtrain.data.delimited import DELIMITERS, cells, checked, column_names
from bigtrain.data.formats import SourceFile, decompressed, json_rows, jsonl, kind_of, parquet_rows
from bigtrain.errors import ConfigError


def texts(file: SourceFile, raw: BinaryIO, text_field: str) -> Iterator[str | None]:
    """The text of each row, None where it has none. Raises ConfigError for a file that is not of its format, and a row
    without such a column."""
    kind, _ = kind_of(file.path.name)

    def wanted(names: list[str]) -> list[str]:
        if text_field not in names and text_field.partition(".")[0] not in names:
            column(dict.fromkeys(names), text_field, str(file.path), 1)
        return [text_field if text_field in names else text_field.partition(".")[0]]

    readers: dict[str, Callable[[], Iterator[Any]]] = {
        "jsonl": lambda: (row for _, row in jsonl(file, decompressed(file, raw))),
        "json": lambda: (row for _, row in json_rows(file, decompressed(file, raw))),
        "parquet": lambda: parquet_rows(file, raw, wanted),
    }
    rows = _delimited(file, raw, kind) if kind in DELIMITERS else readers[kind]()
    for number, row in enumerate(rows, start=1):
        yield column(row, text_field, str(file.path), number)


def _delimited(file: SourceFile, raw: BinaryIO, kind: str) -> Iterator[dict[str, str]]:
    """The rows below the first, which names the columns."""
    rows = cells(file, raw, kind)
    for first in rows:
        names = column_names(file, first)
        for _, row in checked(file, rows, len(names)):
            yield dict(zip(names, row, strict=True))


def column(row: Any, text_field: str, where: str, number: int) -> str | None:
    """The text of one row, None where it is null; `a.b` is b inside the object a, where no column has that name.

    Raises ConfigError if the column is missing or holds no text.
    """
    if not isinstance(row, dict):
        raise ConfigError("data.path", where, f"row {number} is {type(row).__name__}, not an object with named columns")
    text, path = row, [text_field] if text_field in row else text_field.split(".")
    for depth, name in enumerate(path):
        if text is None:  # no object, so no text in it
            return None
        if not isinstance(text, dict) or name not in text:
            inside = ".".join(path[:depth])
            there = (
                ", ".join(f"{inside}.{key}" if inside else str(key) for key in text) if isinstance(text, dict) else ""
            )
            raise ConfigError(
                "data.text_field", text_field, f"no such column in {where} (row {number})",
                f"there are: {there}" if there else f"{inside} is {type(text).__name__}, no object",
            )  # fmt: skip
        text = text[name]
    if text is not None and not isinstance(text, str):
        inner = (
            next((key for key, value in text.items() if isinstance(value, str)), None)
            if isinstance(text, dict)
            else None
        )
        raise ConfigError(
            "data.text_field", text_field, f"row {number} of {where} holds {type(text).__name__}, text is wanted",
            f"as data.text_field={text_field}.{inner}" if inner else "",
        )  # fmt: skip
    return text
