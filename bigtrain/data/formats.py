"""One source file -> its text: plain text in blocks, row formats as one document per row, decompressed as they stream.

Every reader holds a block or a row at a time, never a file. The exception is a `.json` file that is one array:
it is parsed whole, up to ROW_LIMIT bytes.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from bigtrain.errors import BigtrainError, ConfigError

BLOCK_BYTES = 1 << 20
ROW_LIMIT = 256 << 20  # bytes in one line of jsonl or csv: beyond it memory would grow with the corpus
SEPARATOR = "\n<|endoftext|>\n"  # a line that parts the documents of one plain text file, as GPT-2's corpora have it
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
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise file.error(f"cannot be read ({reason})") from None


def rows(file: SourceFile, raw: BinaryIO, text_field: str) -> Iterator[str]:
    """The documents of a row format: the text column of each row, rows without text left out."""
    kind, _ = kind_of(file.path.name)

    def wanted(names: list[str]) -> list[str]:
        if text_field not in names:
            column(dict.fromkeys(names), text_field, str(file.path), 1)
        return [text_field]

    readers: dict[str, Callable[[], Iterator[Any]]] = {
        "jsonl": lambda: (row for _, row in jsonl(file, decompressed(file, raw))),
        "json": lambda: (row for _, row in json_rows(file, decompressed(file, raw))),
        "csv": lambda: _csv(file, decompressed(file, raw), ","),
        "tsv": lambda: _csv(file, decompressed(file, raw), "\t"),
        "parquet": lambda: parquet_rows(file, raw, wanted),
    }
    for number, row in enumerate(readers[kind](), start=1):
        text = column(row, text_field, str(file.path), number)
        if text:
            yield text


def column(row: Any, text_field: str, where: str, number: int) -> str | None:
    """The text of one row, None where it is null. Raises ConfigError if the column is missing or holds no text."""
    if not isinstance(row, dict):
        raise ConfigError("data.path", where, f"row {number} is {type(row).__name__}, not an object with named columns")
    if text_field not in row:
        columns = ", ".join(str(name) for name in row if name is not None)
        raise ConfigError(
            "data.text_field", text_field, f"no such column in {where} (row {number})", f"there are: {columns}"
        )
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise ConfigError(
            "data.text_field", text_field, f"row {number} of {where} holds {type(text).__name__}, text is wanted"
        )
    return text


def text_blocks(file: SourceFile, raw: BinaryIO) -> Iterator[str]:
    """Plain text in blocks of about BLOCK_BYTES, line ends as they are. Raises ConfigError where it is not UTF-8."""
    stream = decompressed(file, raw)
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    while True:
        block = stream.read(BLOCK_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(file, offset - pending + error.start) from None
        if offset == 0:
            text = text.removeprefix("\ufeff")  # a byte order mark is no text
        offset += len(block)
        if text:
            yield text
        if not block:
            return


def split_on_separator(file: SourceFile, blocks: Iterator[str]) -> Iterator[str]:
    """The documents between SEPARATOR lines."""
    buffer = ""
    for block in blocks:
        *documents, buffer = (buffer + block).split(SEPARATOR)
        yield from documents
        if len(buffer) > ROW_LIMIT:
            raise file.error(f"a document between two separators is over {ROW_LIMIT >> 20} MiB")
    yield buffer.removesuffix(SEPARATOR[:-1])


def not_utf8(file: SourceFile, offset: int) -> ConfigError:
    unpacked = " of the decompressed text" if kind_of(file.path.name)[1] else ""
    return file.error(f"not UTF-8 at byte {offset}{unpacked}", "convert it (iconv -t UTF-8) or leave it out")


def decompressed(file: SourceFile, raw: BinaryIO) -> BinaryIO:
    """The bytes behind a .gz or .zst, as they stream; others as they are."""
    _, compression = kind_of(file.path.name)
    if compression == "gzip":
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), BLOCK_BYTES))
    if compression == "zstd":
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, _ZstdReader(file, raw)), BLOCK_BYTES))
    return raw


class _ZstdReader(io.RawIOBase):
    """A .zst stream whose damage reads as OSError, as gzip's does (zstandard has an exception of its own)."""

    def __init__(self, file: SourceFile, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise file.error("reading .zst needs zstandard", "pip install 'bigtrain[data]'") from None
        self._error: type[Exception] = zstandard.ZstdError
        self._stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except self._error as error:
            raise OSError(str(error)) from None


def lines(file: SourceFile, stream: BinaryIO) -> Iterator[str]:
    """Lines with their ends. Raises ConfigError where one is not UTF-8 or is over ROW_LIMIT bytes."""
    offset = 0
    while line := stream.readline(ROW_LIMIT):
        if len(line) == ROW_LIMIT:
            raise file.error(f"a line at byte {offset} is over {ROW_LIMIT >> 20} MiB", "split the document")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(file, offset + error.start) from None
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(line)


def jsonl(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not empty. Raises ConfigError where one is not JSON."""
    for number, line in enumerate(lines(file, stream), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise file.error(f"line {number} is not JSON ({error})") from None


def json_rows(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(number, row): a .json file is one array of rows, or has one row per line as a .jsonl (C4's files are so)."""
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, stream))
    if not buffered.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from jsonl(file, cast(BinaryIO, buffered))
        return
    data = buffered.read(ROW_LIMIT + 1)
    if len(data) > ROW_LIMIT:
        raise file.error(f"one JSON array over {ROW_LIMIT >> 20} MiB", "save it as .jsonl, one row per line")
    try:
        yield from enumerate(json.loads(data.decode("utf-8-sig")), start=1)
    except UnicodeDecodeError as error:
        raise not_utf8(file, error.start) from None
    except (ValueError, RecursionError) as error:
        raise file.error(f"not JSON ({error})") from None


def _csv(file: SourceFile, stream: BinaryIO, delimiter: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(ROW_LIMIT)
    yield from csv.DictReader(lines(file, stream), delimiter=delimiter)


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
