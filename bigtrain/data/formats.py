"""One source file -> its bytes decompressed as they stream, its text in blocks or lines, its rows of JSON or parquet.

Every reader holds a block or a row at a time, never a file. The exception is a `.json` file that is one array:
it is parsed whole, up to ROW_LIMIT bytes.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from bigtrain.errors import BigtrainError, ConfigError

BLOCK_BYTES = 1 << 20
ROW_LIMIT = 256 << 20  # bytes in one line of jsonl or csv: beyond it memory would grow with the corpus
CHUNK_BYTES = 8 << 10  # of a .zst at once: a hostile one becomes 16,000 times as much
MARK = "<|endoftext|>"  # alone on a line it parts the documents of one plain text file, as GPT-2's corpora have it
_END = r"(?:\r\n|[\n\r\x0b\x0c\x85\u2028\u2029])"  # of a line, in every spelling
_BLANKS = r"[ \t\xa0\ufeff]{0,64}"
SEPARATOR = re.compile(f"{_END}{_BLANKS}{re.escape(MARK)}{_BLANKS}(?={_END})")
_OVERLAP = 160  # characters: more than a separator has
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
ROW_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}


@dataclass(frozen=True)
class SourceFile:
    """`name` identifies the file inside the corpus wherever that is moved; `field` is the key to blame for it."""

    path: Path
    name: str
    field: str
    size: int  # bytes as stored
    stamp: tuple[int, int]  # mtime and ctime in ns: a change while the file is read is found out
    digest: str = ""  # SHA-256 of the stored bytes, or a hub dataset's revision

    def error(self, problem: str, way_out: str = "") -> ConfigError:
        return ConfigError(self.field, str(self.path), problem, way_out)


def kind_of(name: str) -> tuple[str, str | None]:
    """(format, compression) of a file name: ("jsonl", "gzip") for "a.jsonl.gz"; any other suffix is plain "text"."""
    path = Path(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    if compression:
        path = path.with_suffix("")
    return ROW_FORMATS.get(path.suffix, "text"), compression


def stamp(path: Path) -> tuple[int, tuple[int, int]]:
    """(size, (mtime, ctime)) of a file. ctime cannot be set from outside, so a rewritten file always shows."""
    status = path.stat()
    return status.st_size, (status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def reading(file: SourceFile) -> Iterator[BinaryIO]:
    """The file opened raw. What goes wrong while it is read becomes one line that names it."""
    try:
        with open(file.path, "rb") as raw:
            yield raw
        if stamp(file.path) != (file.size, file.stamp):
            raise file.error("changed while it was read", "run again when nothing writes to it")
    except BigtrainError:
        raise
    except FileNotFoundError:
        raise file.error("no such file") from None
    except EOFError as error:
        raise file.error(f"cannot be read ({error})", "it is cut off: fetch it again") from None
    except (OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise file.error(f"cannot be read ({reason})") from None


def text_blocks(file: SourceFile, raw: BinaryIO) -> Iterator[str]:
    """Plain text in blocks of about BLOCK_BYTES, line ends as they are. Raises ConfigError where it is not UTF-8."""
    stream = decompressed(file, raw)
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    while True:
        block = stream.read(BLOCK_BYTES)
        if offset == 0 and utf_16(block):
            raise not_utf8(file, 0, block)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(file, offset - pending + error.start, block if offset == 0 else b"") from None
        if offset == 0:
            text = text.removeprefix("\ufeff")  # a byte order mark is no text
        offset += len(block)
        if text:
            yield text
        if not block:
            return


def has_separator(blocks: Iterable[str]) -> bool:
    """Whether a line of the text is a separator, wherever it stands."""
    tail = "\n"
    for block in chain(blocks, ["\n"]):
        window = tail + block
        if MARK in window and SEPARATOR.search(window):
            return True
        tail = window[-_OVERLAP:]
    return False


def split_on_separator(file: SourceFile, blocks: Iterable[str]) -> Iterator[str]:
    """The documents between separator lines, without the line ends next to those.

    Raises ConfigError for a document over ROW_LIMIT characters.
    """
    parts, size, tail = ["\n"], 1, "\n"  # every document begins with the end of the line before
    for block in chain(blocks, ["\n"]):
        parts.append(block)
        size += len(block)
        tail += block
        if MARK in tail:
            *documents, rest = SEPARATOR.split("".join(parts))
            yield from map(_without_first_end, documents)
            parts, size, tail = [rest], len(rest), rest
        tail = tail[-_OVERLAP:]
        if size > ROW_LIMIT:
            raise file.error(f"a document between two separators is over {ROW_LIMIT >> 20} MiB", "split it")
    yield _without_first_end("".join(parts)).removesuffix("\n")


def _without_first_end(document: str) -> str:
    return document[2:] if document.startswith("\r\n") else document[1:]


def not_utf8(file: SourceFile, offset: int, head: bytes = b"") -> ConfigError:
    """`head`: what the file begins with, where that is at hand."""
    unpacked = " of the decompressed text" if kind_of(file.path.name)[1] else ""
    encoding = utf_16(head)
    if encoding:
        return file.error(f"not UTF-8 but {encoding}", f"convert it (iconv -f {encoding} -t UTF-8) or leave it out")
    return file.error(f"not UTF-8 at byte {offset}{unpacked}", "convert it (iconv -t UTF-8) or leave it out")


def utf_16(head: bytes) -> str | None:
    """ "UTF-16" or "UTF-32" if a file that begins so is text in it: by its byte order mark, or by the zeros between
    letters. None for anything else."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    head = head[:8192]
    zeros = [head[start::2].count(0) / max(len(head[start::2]), 1) for start in (0, 1)]
    for rare, often, encoding in ((zeros[0], zeros[1], "UTF-16LE"), (zeros[1], zeros[0], "UTF-16BE")):
        if len(head) >= 8 and often > 0.7 and rare < 0.05:
            return encoding
    return None


def decompressed(file: SourceFile, raw: BinaryIO) -> BinaryIO:
    """The bytes behind a .gz or .zst, as they stream; others as they are."""
    _, compression = kind_of(file.path.name)
    if compression and not file.size:
        raise file.error("is empty, not even a packed file", "fetch it again")
    if compression == "gzip":
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), BLOCK_BYTES))
    if compression == "zstd":
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, _ZstdReader(file, raw)), BLOCK_BYTES))
    return raw


class _ZstdReader(io.RawIOBase):
    """The frames of a .zst, one after another. Damage reads as OSError, a frame without its end as EOFError, as gzip's
    do (zstandard has an exception of its own, and its stream_reader takes half a frame for a whole one)."""

    def __init__(self, file: SourceFile, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise file.error("reading .zst needs zstandard", "pip install 'bigtrain[data]'") from None
        self._error: type[Exception] = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._raw, self._rest, self._ready = raw, b"", memoryview(b"")
        self._frame: Any = None  # what decompresses the frame that has begun

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and (chunk := self._rest or self._raw.read(CHUNK_BYTES)):
            self._ready = memoryview(self._decompressed(chunk))
        if not self._ready and self._frame is not None:
            raise EOFError("the file ends within a zstd frame")
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompressed(self, chunk: bytes) -> bytes:
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            found: bytes = self._frame.decompress(chunk)
        except self._error as error:
            raise OSError(str(error)) from None
        self._rest = b""
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return found


def lines(file: SourceFile, stream: BinaryIO) -> Iterator[str]:
    """Lines with their ends: \\n or \\r\\n, or \\r where a file has no other (as old spreadsheets wrote them).

    Raises ConfigError where one is not UTF-8 or is over ROW_LIMIT bytes.
    """
    offset = 0
    while line := stream.readline(ROW_LIMIT):
        if offset == 0 and utf_16(line):
            raise not_utf8(file, 0, line)
        if len(line) == ROW_LIMIT:
            raise file.error(f"a line at byte {offset} is over {ROW_LIMIT >> 20} MiB", "split the document")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(file, offset + error.start, line) from None
        if offset:
            yield text
        else:
            text = text.removeprefix("\ufeff")
            yield from [text] if text.endswith("\n") else io.StringIO(text, newline="")
        offset += len(line)


def jsonl(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not empty. Raises ConfigError where one is not JSON."""
    for number, line in enumerate(lines(file, stream), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                array = "an array of rows is a .json file" if number == 1 and line.lstrip().startswith("[") else ""
                raise file.error(f"line {number} is not JSON ({error})", array) from None


def json_rows(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(number, row): a .json file is one array of rows, or has one row per line as a .jsonl (C4's files are so).

    Raises ConfigError for one object that has its rows under a key.
    """
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, stream))
    head = buffered.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"[") or re.match(rb"\{\s*[\r\n]", head):
        yield from _whole_json(file, buffered)
        return
    rows = jsonl(file, cast(BinaryIO, buffered))
    first = list(islice(rows, 2))
    if len(first) == 1:
        _check_rows(file, first[0][1])
    yield from chain(first, rows)


def _whole_json(file: SourceFile, stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    data = stream.read(ROW_LIMIT + 1)
    if len(data) > ROW_LIMIT:
        raise file.error(f"one JSON array over {ROW_LIMIT >> 20} MiB", "save it as .jsonl, one row per line")
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(file, error.start, data) from None
    except (ValueError, RecursionError) as error:
        raise file.error(f"not JSON ({error})", "wanted: an array of rows, or one row per line") from None
    _check_rows(file, found)
    yield from enumerate(found if isinstance(found, list) else [found], start=1)


def _check_rows(file: SourceFile, found: Any) -> None:
    """Raises ConfigError where the one value of a file holds the rows, and is not one of them."""
    if not isinstance(found, dict):
        return
    for key, value in found.items():
        rows = isinstance(value, list) and len(value) > 1 and all(isinstance(row, dict) for row in value)
        if rows and not {"role", "from"} & value[0].keys():  # those are messages of one conversation
            raise file.error(
                f"one object, whose rows lie under {key!r}; an array of rows is wanted",
                f"save that alone (jq .{key} FILE)",
            )
    columns = list(found.values())
    if len(columns) > 1 and all(isinstance(value, dict) and value.keys() == columns[0].keys() for value in columns):
        raise file.error(
            "one object of columns; an array of rows is wanted", "save it so (of pandas: to_json(orient='records'))"
        )


def parquet_rows(file: SourceFile, raw: BinaryIO, wanted: Callable[[list[str]], list[str]]) -> Iterator[dict[str, Any]]:
    """The rows of those columns that `wanted` picks from the names of all. Raises ConfigError for no parquet file."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise file.error("reading .parquet needs pyarrow", "pip install 'bigtrain[data]'") from None
    try:
        table = parquet.ParquetFile(raw)
        names = wanted(table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256, columns=names, use_threads=False):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise file.error(f"not a readable parquet file ({str(error).splitlines()[0]})") from None
