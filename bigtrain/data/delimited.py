"""Cells of .csv and .tsv files, row by row: one reader for tables of labelled rows and for tables read as text.

A .csv row may span lines in quotes. A .tsv row is one line wherever it can be: in many published .tsv files (GLUE's
are an example) a quote at the start of a cell is a character of the text, and a csv reader would swallow all lines up
to the next one. Only lines that are no rows themselves are taken for the rest of a cell in quotes.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import BinaryIO

from bigtrain.data.formats import ROW_LIMIT, SourceFile, decompressed, lines
from bigtrain.errors import ConfigError

DELIMITERS = {"csv": ",", "tsv": "\t"}
MOST_LINES = 1000  # of a .tsv row
NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}

Cells = tuple[int, list[str]]  # the number of a row's first line, its cells


def cells(file: SourceFile, raw: BinaryIO, kind: str) -> Iterator[Cells]:
    """The rows of a "csv" or "tsv" file that hold anything, its first too, whether it names the columns or not.

    Raises ConfigError for a line that is no row, and for a file whose cells are parted by something else.
    """
    text = _lines(file, raw, DELIMITERS[kind])
    found = _tsv(text) if kind == "tsv" else _csv(file, text)
    first = next(found, None)
    if first is None:
        return
    _check_delimiter(file, first, DELIMITERS[kind])
    yield from chain([first], found)


def checked(file: SourceFile, rows: Iterable[Cells], width: int) -> Iterator[Cells]:
    """The rows. Raises ConfigError for one that has not `width` cells."""
    for number, found in rows:
        if len(found) != width:
            hint = " (a .tsv row is one line)" if len(found) < width and found[-1].startswith('"') else ""
            raise file.error(
                f"line {number} has {_columns(len(found))} where the first has {width}{hint}",
                "mend the line, or save as .jsonl",
            )
        yield number, found


def column_names(file: SourceFile, first: Cells) -> list[str]:
    """Names from a header; a column without one goes by its number. Raises ConfigError for a name that comes twice."""
    number, found = first
    names = [name.strip() or str(column) for column, name in enumerate(found)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise file.error(f"line {number}: two columns are named {twice[0]!r}", "rename one, or set data.header=false")
    return names


def _lines(file: SourceFile, raw: BinaryIO, delimiter: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, without the one in which spreadsheets say what parts the cells."""
    for number, line in enumerate(lines(file, decompressed(file, raw)), start=1):
        if "\0" in line:
            raise file.error(
                f"line {number} holds a NUL byte, which is no text", "remove it (tr -d '\\000'), or mend it"
            )
        if number == 1 and line.lower().startswith("sep=") and len(line.rstrip("\r\n")) == 5:
            if line[4] != delimiter:
                raise _parted(file, "line 1 says that", line[4], delimiter)
            line = "\n"
        yield number, line


def _check_delimiter(file: SourceFile, first: Cells, delimiter: str) -> None:
    number, found = first
    if len(found) == 1:
        for other in NAMES:
            if other != delimiter and all(name.strip() for name in found[0].split(other)) and other in found[0]:
                raise _parted(file, f"in line {number}", other, delimiter)


def _parted(file: SourceFile, where: str, other: str, delimiter: str) -> ConfigError:
    kind = next(kind for kind, known in DELIMITERS.items() if known == delimiter)
    return file.error(
        f"{where} cells are parted by {NAMES.get(other, repr(other))} ({other!r}), a .{kind}'s by {NAMES[delimiter]}",
        "name it .tsv" if other == "\t" else "name it .csv" if other == "," else f"save it with {NAMES[delimiter]}",
    )


def _columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"


def _tsv(text: Iterator[tuple[int, str]]) -> Iterator[Cells]:
    waiting: deque[tuple[int, str]] = deque()  # lines that were looked at ahead
    width = 0
    while numbered := waiting.popleft() if waiting else next(text, None):
        number, line = numbered
        if not line.strip():
            continue
        found = line.rstrip("\r\n").split("\t")
        width = width or len(found)
        if found[-1].startswith('"') and found[-1].count('"') % 2:
            whole = _spanning(line, waiting, text, width)
            if whole:
                yield number, whole
                continue
        yield number, [_unquoted(cell) for cell in found]


def _spanning(line: str, waiting: deque[tuple[int, str]], text: Iterator[tuple[int, str]], width: int) -> list[str]:
    """The cells of a row that goes on over lines in quotes, which are taken from `waiting` and `text`. Empty where
    the quote is a character, as it is where a line before the end of the cell is a row itself."""
    lines, ahead = [line], 0
    while ahead < MOST_LINES:
        if ahead == len(waiting):
            if (following := next(text, None)) is None:
                break
            waiting.append(following)
        following_line = waiting[ahead][1]
        ahead += 1
        if len(following_line.rstrip("\r\n").split("\t")) == width:
            break
        lines.append(following_line)
        if '"' in following_line:
            with suppress(csv.Error, ValueError):  # not whole yet, or more than one row
                (found,) = csv.reader(lines, delimiter="\t", strict=True)
                if len(found) == width:
                    for _ in range(ahead):
                        waiting.popleft()
                    return found
    return []


def _unquoted(cell: str) -> str:
    """The cell without the quotes that a csv writer put around it; any other cell as it is."""
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _csv(file: SourceFile, text: Iterable[tuple[int, str]]) -> Iterator[Cells]:
    csv.field_size_limit(ROW_LIMIT)
    # "\r" alone ends a row too, where it stands in no quotes: the reader wants it at the end of what it is given
    parts = (part for _, line in text for part in io.StringIO(line, newline=""))
    reader = csv.reader(parts, strict=True)  # strict: a quote that is never closed is an error, not one huge cell
    while True:
        start = reader.line_num + 1
        try:
            found = next(reader, None)
        except csv.Error as error:
            raise file.error(
                f"line {start} is no row of csv ({error})", 'a quote inside quotes is written ""'
            ) from None
        if found is None:
            return
        if any(cell.strip() for cell in found):
            yield start, found
