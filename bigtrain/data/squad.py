"""SQuAD files (versions 1.1 and 2.0) as rows, article by article: the whole of one is never in memory.

Source: Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822). The file is one object whose `data` is a
list of articles; each has paragraphs, each of those a context and its questions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from bigtrain.data.formats import ROW_LIMIT, SourceFile, decompressed, text_blocks
from bigtrain.data.tables import Row

START = re.compile(r'\s*\{\s*(?:"version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[')


def is_squad(file: SourceFile, raw: BinaryIO) -> bool:
    """Whether the file begins as SQuAD's do. `raw` is left at the file's start."""
    head = decompressed(file, raw).read(4096).decode("utf-8", errors="replace").removeprefix("\ufeff")
    raw.seek(0)
    return START.match(head) is not None


def rows(file: SourceFile, raw: BinaryIO) -> Iterator[Row]:
    """Rows {id, question, context, answers}. An entry of `data` without paragraphs is taken for such a row itself.

    Raises ConfigError where an article is no JSON or a part of it is missing, naming the question where there is one.
    """
    for line, article in _articles(file, raw):
        if not isinstance(article, dict):
            raise file.error(f"line {line}: an entry of data is {type(article).__name__}, not an article")
        if "paragraphs" not in article:
            yield f"line {line}", article
            continue
        title = f"article {article['title']!r}" if article.get("title") else f"the article at line {line}"
        for paragraph in _list(file, article, "paragraphs", title):
            for question in _list(file, paragraph, "qas", title):
                where = f"question {question['id']}" if "id" in question else title
                if "context" not in paragraph:
                    raise file.error(f"{where}: its paragraph has no context")
                yield where, {**question, "context": paragraph["context"]}


def _list(file: SourceFile, parent: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = parent.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise file.error(f"{where}: {key} is not a list of objects")
    return found


def _check_end(file: SourceFile, line: int, rest: str) -> None:
    """Raises ConfigError where what follows the articles is not the end of the object: reading it finds a cut file."""
    try:
        json.loads('{"data": [' + rest)
    except (ValueError, RecursionError):
        raise file.error(f"line {line}: no JSON after data", "if it is cut off, fetch it again") from None


def _articles(file: SourceFile, raw: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line on which it starts, entry) of the list `data`: the buffer holds one entry and a block."""
    blocks = text_blocks(file, raw)
    buffer = next(blocks, "")
    match = START.match(buffer)
    assert match is not None, "is_squad has looked"
    position, line = match.end(), 1 + buffer.count("\n", 0, match.end())
    decode = json.JSONDecoder().raw_decode

    def more() -> bool:
        """Read as much again as is waiting, so that a long entry is not parsed once for every block of it."""
        nonlocal buffer, position
        wanted, parts = max(len(buffer) - position, 1), [buffer[position:]]
        while wanted > 0 and (block := next(blocks, "")):
            parts.append(block)
            wanted -= len(block)
        buffer, position = "".join(parts), 0
        return len(parts) > 1

    while True:
        start = position
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        line += buffer.count("\n", start, position)
        if position == len(buffer):
            if not more():
                raise file.error(f"line {line}: the file ends within data", "it seems cut off: fetch it again")
        elif buffer[position] == "]":
            _check_end(file, line, buffer[position:] + "".join(blocks))
            return
        else:
            try:
                article, end = decode(buffer, position)
            except (ValueError, RecursionError) as error:
                if len(buffer) - position > ROW_LIMIT:
                    raise file.error(f"line {line}: an article over {ROW_LIMIT >> 20} MiB") from None
                at = line + buffer.count("\n", position, getattr(error, "pos", position))
                if not more():
                    reason = getattr(error, "msg", str(error))
                    raise file.error(f"line {at} is not JSON ({reason})", "if it is cut off, fetch it again") from None
            else:
                yield line, article
                line += buffer.count("\n", position, end)
                position = end
