"""Sentences in the layout of the CoNLL shared tasks: a token and its tags on each line, a blank line after a sentence.

Columns are parted by a tab, or in a line without one by spaces.
Source: Tjong Kim Sang and De Meulder 2003 (CoNLL-2003).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from bigtrain.data.formats import SourceFile
from bigtrain.errors import ConfigError

PEEK_SENTENCES = 64
LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)?:")  # WikiANN (PAN-X) writes every token as en:token

Sentence = tuple[int, list[str], list[str]]  # the number of its first line, words, tags


def sentences(file: SourceFile, text: Iterable[str], words: int = 0, tags: int = -1) -> Iterator[Sentence]:
    """Each sentence of the file; `words` and `tags` are the columns' numbers, negative ones counted from the end.

    -DOCSTART- lines are left out, comments too (lines that begin with "#" and have other columns than the rest), and
    so is a language prefix that all tokens of the first sentences have.
    Raises ConfigError for a line with another number of columns than the first, or with an empty word or tag.
    """
    found = _sentences(file, text, words, tags)
    head = list(islice(found, PEEK_SENTENCES))
    prefixes = {match.group() if (match := LANGUAGE.match(word)) else "" for _, found, _ in head for word in found}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    for line, tokens, labels in chain(head, found):
        bare = [token.removeprefix(prefix) for token in tokens]
        if "" in bare:
            raise file.error(f"line {line + bare.index('')}: no token before the tag")
        yield line, bare, labels


def _sentences(file: SourceFile, text: Iterable[str], words: int, tags: int) -> Iterator[Sentence]:
    width, first = 0, 0
    tokens: list[str] = []
    labels: list[str] = []
    numbered = enumerate(text, start=1)
    head: list[tuple[int, str]] = []
    for number, whole in numbered:  # up to the first line that is surely a token's: it says how many columns there are
        head.append((number, whole))
        cells = _cells(whole)
        if cells and cells[0].split()[:1] != ["#"]:
            width = _width(file, number, cells, words, tags)
            break
    for number, whole in chain(head, numbered):
        line, cells = whole.rstrip("\r\n"), _cells(whole)
        if not cells:
            if tokens:
                yield first, tokens, labels
            tokens, labels = [], []
            continue
        if len(cells) != width and cells[0].split()[:1] == ["#"]:
            continue
        if len(cells) != width:
            raise _broken(file, number, whole, len(cells), width)
        if not cells[words].strip() or not cells[tags].strip():
            missing = "tag after the token" if cells[words].strip() else "token before the tag"
            raise file.error(f"line {number}: no {missing} in {line!r}", "mend or remove the line")
        first = first if tokens else number
        tokens.append(cells[words])
        labels.append(cells[tags].strip())
    if tokens:
        yield first, tokens, labels


def _cells(line: str) -> list[str]:
    """The columns of a line; none where it parts sentences."""
    line = line.rstrip("\r\n")
    if line.startswith("-DOCSTART-"):
        return []
    if "\t" in line:
        return line.split("\t") if line.strip(" \t") else []
    return [cell for cell in line.split(" ") if cell]


def _width(file: SourceFile, number: int, cells: list[str], words: int, tags: int) -> int:
    if len(cells) < 2:
        raise file.error(
            f"line {number}: no tag after the token {cells[0]!r}", "token and tag are parted by a tab or space"
        )
    for field, column in (("words", words), ("tags", tags)):
        if not -len(cells) <= column < len(cells):
            raise ConfigError(
                f"data.columns.{field}", column, f"line {number} of {file.path} has {len(cells)} columns",
                f"give a number from 0 to {len(cells) - 1}",
            )  # fmt: skip
    return len(cells)


def _broken(file: SourceFile, number: int, line: str, columns: int, width: int) -> ConfigError:
    cut_off = "" if line.endswith("\n") else "; the file ends in this line, it may be cut off"
    line = line.rstrip("\r\n")
    shown = repr(line if len(line) <= 60 else line[:57] + "...")
    problem = (
        f"no tag after the token {shown}" if columns == 1 else f"{columns} columns where the first has {width}: {shown}"
    )
    return file.error(f"line {number}: {problem}{cut_off}", "mend or remove the line")
