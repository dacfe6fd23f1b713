"""Sources -> one stream of text pieces, each already assigned to train or held-out.

How the split falls, so that it is the same on every machine and in every run:

- standard library: by file, by a hash of its relative path;
- rows (jsonl, parquet, csv, hub datasets, text files with <|endoftext|> lines): by a hash of the row's text, so exact
  duplicates fall on the same side and a corpus that grows keeps its held-out rows;
- plain text files: by file, by a hash of the content. A file that is so large a part of the corpus that it would
  upset the fraction (a corpus of one file always is) is cut at paragraphs into pieces, of which evenly spaced ones
  are held out. Neighbouring pieces of the same split stay one document, so cutting costs no context.

Memory: one block, row or piece at a time.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import stat
import sysconfig
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from bigtrain.config import DataConfig, LabelledDataConfig, StdlibDataConfig, TextDataConfig
from bigtrain.data import hub
from bigtrain.data.formats import (
    SEPARATOR,
    SourceFile,
    has_separator,
    kind_of,
    reading,
    split_on_separator,
    stamp,
    text_blocks,
)
from bigtrain.data.left_out import LeftOut, why_left_out
from bigtrain.data.text_rows import texts
from bigtrain.errors import ConfigError
from bigtrain.files import as_utf8
from bigtrain.hardware import cores

PIECE_CHARS = 1 << 20  # no piece is longer: what a worker encodes at once stays bounded
CUT_PIECE_CHARS = (1 << 10, 64 << 10)  # least and most in a piece of a file that is cut for the split
CUT_PIECES = 4  # a cut file gives at least this many held-out pieces
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}  # tests: not shipped by every distribution


@dataclass(frozen=True)
class Piece:
    """Text that is encoded at once: a document, or a part of a long one. `starts`: a document begins with it."""

    text: str
    held_out: bool
    starts: bool
    n_bytes: int


@dataclass
class Corpus:
    """Files (or one hub dataset) in their fixed order. `position` counts stored bytes read so far, for progress."""

    files: list[SourceFile]
    held_out: float
    held_out_files: list[SourceFile] = field(default_factory=list)
    text_field: str = "text"
    by_path: bool = False  # split by file name (the standard library)
    hub_config: str | None = None
    left_out: LeftOut = field(default_factory=LeftOut)  # files of a directory that are not read
    position: int = 0
    blank_rows: int = 0  # that the last reading of the whole found without text
    _separated: dict[str, bool] = field(default_factory=dict, repr=False)  # by file: has it separator lines?
    _below: float = field(init=False, repr=False)  # documents whose digest is below it are held out
    _digests: list[int] = field(default_factory=lambda: [2**64, -1], repr=False)  # the lowest and the highest so far

    def __post_init__(self) -> None:
        self._below = self.held_out * 2**64

    @property
    def size(self) -> int:
        """Stored bytes; 0 for a hub dataset."""
        return sum(file.size for file in chain(self.files, self.held_out_files))

    def identity(self) -> dict[str, Any]:
        """What the stream depends on, for the fingerprint: names and content, not where it lies."""
        return {
            "files": [(file.name, file.digest) for file in self.files],
            "held_out_files": [(file.name, file.digest) for file in self.held_out_files],
            "held_out": self.held_out if not self.held_out_files else None,
            "text_field": self.text_field,
            "by_path": self.by_path,
            "hub_config": self.hub_config,
            "pieces": (PIECE_CHARS, CUT_PIECE_CHARS, CUT_PIECES, SEPARATOR.pattern),
        }

    def settle_split(self) -> None:
        """Let there be a document to train on and one that is held out, where there are two at all.

        Each document falls out by its own digest, so of a few perhaps none or all do: then the one with the lowest
        digest is the held-out one, or the one with the highest is left to train on. Reads on until both are seen.
        """
        if self.held_out_files:
            return
        self._digests = [2**64, -1]
        seen = set()
        for piece in self.pieces():
            seen.add(piece.held_out)
            if len(seen) == 2:
                return
        least, most = self._digests
        if least < most:
            self._below = most if seen == {True} else least + 1

    def pieces(self) -> Iterator[Piece]:
        """The whole corpus in order. Raises ConfigError at the first file that cannot be used."""
        self.position = self.blank_rows = 0
        for files, fixed in ((self.files, False if self.held_out_files else None), (self.held_out_files, True)):
            for file in files:
                before = self.position
                yield from self.file_pieces(file, fixed)
                self.position = before + file.size

    def train_sample(self, n_bytes: int) -> Iterator[str]:
        """About n_bytes of training text from all over the corpus: files in hashed order, a share of each."""
        share = max(n_bytes // max(len(self.files), 1), 1 << 20)
        left = n_bytes
        for file in sorted(self.files, key=lambda file: digest_of(as_utf8(file.name))):
            quota = min(share, left)
            for piece in self.file_pieces(file, False if self.held_out_files else None):
                if quota <= 0:
                    break
                if not piece.held_out:
                    quota -= piece.n_bytes
                    left -= piece.n_bytes
                    yield piece.text
            if left <= 0:
                return

    def file_pieces(self, file: SourceFile, fixed: bool | None) -> Iterator[Piece]:
        """One file's pieces; `fixed` says which split it belongs to where that is settled."""
        if file.stamp == hub.STAMP:
            for row in hub.dataset_rows(file, self.hub_config, self.text_field):
                self.blank_rows += not row or row.isspace()
                yield from self._row(file, row or "", fixed)
            return
        start = self.position
        with reading(file) as raw:
            for piece in self._read(file, raw, fixed):
                self.position = start + raw.tell()
                yield piece

    def _read(self, file: SourceFile, raw: Any, fixed: bool | None) -> Iterator[Piece]:
        if kind_of(file.path.name)[0] != "text":
            for row in texts(file, raw, self.text_field):
                self.blank_rows += not row or row.isspace()
                yield from self._row(file, row or "", fixed)
            return
        separated = self._is_separated(file, raw)
        blocks = text_blocks(file, raw)
        if separated:
            for text in split_on_separator(file, blocks):
                yield from self._row(file, text, fixed)
        elif fixed is None and not self.by_path and file.size > self.held_out * self.size / CUT_PIECES:
            yield from self._cut(blocks, file.size)
        else:
            key = file.name if self.by_path else file.digest
            held_out = self._falls_out(as_utf8(key)) if fixed is None else fixed
            yield from _document(cut(blocks, PIECE_CHARS), held_out)

    def _is_separated(self, file: SourceFile, raw: Any) -> bool:
        """Whether separators part the file's documents. One may stand anywhere: all of it is looked through, once."""
        if self.by_path:
            return False
        path = str(file.path)
        if path not in self._separated:
            self._separated[path] = has_separator(text_blocks(file, raw))
            raw.seek(0)
        return self._separated[path]

    def _row(self, file: SourceFile, text: str, fixed: bool | None) -> Iterator[Piece]:
        if not text or text.isspace():
            return
        try:
            held_out = self._falls_out(text.encode()) if fixed is None else fixed
            yield from _document(cut([text], PIECE_CHARS), held_out)
        except UnicodeEncodeError as error:
            raise file.error(f"a row holds half a surrogate pair ({text[error.start]!r}), which is no text") from None

    def _cut(self, blocks: Iterable[str], size: int) -> Iterator[Piece]:
        least, most = CUT_PIECE_CHARS
        length = min(max(int(self.held_out * size / CUT_PIECES), least), most)
        previous: bool | None = None
        for number, text in enumerate(cut(blocks, length)):
            # Evenly spaced: of the first n pieces round(n * held_out) are held out, for every n.
            held_out = math.floor((number + 1) * self.held_out + 0.5) > math.floor(number * self.held_out + 0.5)
            yield Piece(text, held_out, held_out != previous, len(text.encode()))
            previous = held_out

    def _falls_out(self, key: bytes) -> bool:
        digest, (least, most) = digest_of(key), self._digests
        self._digests = [min(least, digest), max(most, digest)]
        return digest < self._below


def cut(blocks: Iterable[str], length: int) -> Iterator[str]:
    """Text in blocks of any size -> pieces of at most `length` characters, the same whatever the blocks were.

    A piece ends after the last empty line of its second half, else after its last line, else before its last
    space, else at `length`. The pieces joined are the text.
    """
    buffer, start = "", 0
    for block in blocks:
        buffer, start = buffer[start:] + block, 0
        while len(buffer) - start > length:
            end = _end(buffer, start, length)
            yield buffer[start:end]
            start = end
    if len(buffer) > start:
        yield buffer[start:]


def _end(buffer: str, start: int, length: int) -> int:
    for mark, after in (("\n\n", 2), ("\n", 1), (" ", 0)):
        at = buffer.rfind(mark, start + length // 2, start + length)
        if at > start:
            return at + after
    return start + length


def _document(texts: Iterable[str], held_out: bool) -> Iterator[Piece]:
    for number, text in enumerate(texts):
        yield Piece(text, held_out, number == 0, len(text.encode()))


def digest_of(key: bytes) -> int:
    """64 evenly distributed bits of `key`."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


# -------------------------------------------------------------------------------------------------- finding


def open_corpus(data: DataConfig, cache: Path) -> Corpus:
    """Find and fingerprint the sources that `data` names.

    Raises ConfigError for a path that does not exist, cannot be read, or holds no file.
    """
    if isinstance(data, StdlibDataConfig):
        return Corpus(hashed(_stdlib_files(), cache), data.held_out, by_path=True)
    if isinstance(data, LabelledDataConfig):
        raise ConfigError("data.kind", data.kind, "holds labelled examples, running text is wanted", "data=text")
    files, left_out = find(data, "data.path", data.path or [])
    held_out_files, left_out_too = find(data, "data.held_out_path", data.held_out_path or [])
    held_out_paths = {file.path.resolve() for file in held_out_files}
    files = [file for file in files if file.path.resolve() not in held_out_paths]
    if not files:
        raise ConfigError("data.path", shown(data.path), f"holds no text file{left_out.also()}")
    return Corpus(
        hashed(files, cache), data.held_out, hashed(held_out_files, cache), data.text_field,
        hub_config=data.name, left_out=left_out + left_out_too,
    )  # fmt: skip


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if STDLIB_LEFT_OUT.isdisjoint(relative.parts):
            try:
                path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # source in another encoding (PEP 263), or a broken link: not ours to repair
            found.append(_source(path, relative.as_posix(), "data.kind"))
    return found


def _source(path: Path, name: str, key: str) -> SourceFile:
    size, times = stamp(path)
    return SourceFile(path, name, key, size, times)


def find(
    data: TextDataConfig | LabelledDataConfig, key: str, paths: str | list[str]
) -> tuple[list[SourceFile], LeftOut]:
    """The files that paths, directories and globs name, in order, each once; and those of directories that are not
    read. A file that is named outright always is, or refused."""
    found: dict[str, SourceFile] = {}
    left_out = LeftOut()
    for given in [paths] if isinstance(paths, str) else paths:
        path = Path(os.path.expanduser(given))
        try:
            files = _files(path, key, left_out)
        except OSError as error:
            raise ConfigError(key, error.filename or given, f"cannot be read ({error.strerror or error})") from None
        files = files or ([] if path.exists() else [hub.dataset_source(given, key, data.name)])
        for file in files:
            why = why_left_out(file) if file.path != path and file.stamp != hub.STAMP else None
            if why:
                left_out.add(str(file.path), why)
            else:
                found.setdefault(os.path.realpath(file.path), file)
    return list(found.values()), left_out


def _files(path: Path, key: str, left_out: LeftOut) -> list[SourceFile]:
    """The files of one path; none if there is no such path, or nothing in it. Raises OSError."""
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        everything = glob.glob(str(path), recursive=True)
        matches = [match for match in everything if os.path.isfile(match)]
        for match in everything if matches and "**" not in str(path) else ():
            if os.path.isdir(match):
                left_out.add(match, "a directory, into which ** goes")
        # "**" goes round in a loop of links: of the many names of one file the shortest is kept
        shortest = {os.path.realpath(match): match for match in sorted(matches, key=len, reverse=True)}
        root = os.path.commonpath([os.path.dirname(match) for match in matches]) if matches else ""
        names = {match: Path(os.path.relpath(match, root)).as_posix() for match in sorted(shortest.values())}
        return [_source(Path(match), name, key) for match, name in names.items()]
    if is_directory:
        return [_source(file, file.relative_to(path).as_posix(), key) for file in _walk(path, left_out)]
    return [_source(path, path.name, key)]


def _walk(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """Every regular file below `root` in a fixed order, hidden ones left out; links followed, once. Raises OSError."""

    def fail(error: OSError) -> None:  # os.walk would pass over a directory that it cannot read
        raise error

    seen = set()
    for directory, subdirectories, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            subdirectories.clear()
            continue
        seen.add(real)
        for name in sorted(name for name in (*subdirectories, *names) if name.startswith(".")):
            left_out.add(os.path.join(directory, name), "hidden")
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(directory, name)
            if path.is_file():
                yield path
            else:
                left_out.add(str(path), "a link to nothing" if path.is_symlink() else "no regular file")


def shown(paths: str | list[str] | None) -> object:
    return paths[0] if isinstance(paths, list) and len(paths) == 1 else paths


# -------------------------------------------------------------------------------------------------- hashing


def hashed(files: list[SourceFile], cache: Path) -> list[SourceFile]:
    """Fill in each file's digest, reading in threads (hashlib frees the interpreter lock).

    A large file's hash is kept beside the shards and used again while size, mtime, ctime and inode stand: nothing can
    write to a file and leave its ctime. A file changed within the last 2 s is not kept, its clock may not tick.
    """
    record = cache / "hashes.json"
    try:
        known: dict[str, list[Any]] = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    fresh: dict[str, list[Any]] = {}

    def digest(file: SourceFile) -> SourceFile:
        if file.digest:
            return file
        path = str(file.path.resolve())
        state = [file.size, *file.stamp, os.stat(path).st_ino]
        if known.get(path, [])[:-1] == state:
            return replace(file, digest=known[path][-1])
        sha = hashlib.sha256()
        with reading(file) as raw:
            while block := raw.read(1 << 20):
                sha.update(block)
        if file.size >= 1 << 20 and time.time_ns() - file.stamp[1] > 2_000_000_000:
            fresh[path] = [*state, sha.hexdigest()]
        return replace(file, digest=sha.hexdigest())

    with ThreadPoolExecutor(min(cores(), 8)) as pool:
        hashed = list(pool.map(digest, files))
    if fresh:
        temporary = record.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known | fresh), encoding="utf-8")
        temporary.replace(record)
    return hashed
