"""Which files of a directory are not read, and saying so: a line on the terminal, an entry in the run's record."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bigtrain.data.formats import SourceFile, kind_of, reading, utf_16
from bigtrain.data.shards import META
from bigtrain.files import printable, write_atomic

# Beside these compressions there are others, which nothing here unpacks.
PACKED = [
    ".bz2",
    ".xz",
    ".lzma",
    ".lz4",
    ".br",
    ".sz",
    ".snappy",
    ".z",
    ".lz",
    ".lzo",
    ".zip",
    ".7z",
    ".rar",
    ".tar",
    ".tgz",
    ".tbz",
    ".tbz2",
    ".txz",
    ".tzst",
    ".cab",
    ".jar",
    ".whl",
]
DOCUMENTS = [
    ".pdf",
    ".doc",
    ".docx",
    ".odt",
    ".rtf",
    ".xls",
    ".xlsx",
    ".ods",
    ".ppt",
    ".pptx",
    ".epub",
    ".mobi",
    ".arrow",
    ".feather",
    ".orc",
    ".avro",
]
PACKED_WHY, DOCUMENT_WHY = "packed, in a way that is not read", "of a format that is not read"
HARMLESS = ("hidden", "empty")
SHOWN = 5  # files named on the terminal
RECORDED = 100  # and in a record


@dataclass
class LeftOut:
    """Paths that were not read -> why. Two of them can be added."""

    why: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, why: str) -> None:
        self.why.setdefault(path, why)

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(self.why | other.why)

    def __len__(self) -> int:
        return len(self.why)

    def also(self) -> str:
        """In brackets, for an error that nothing is left."""
        return f" ({self._listed(SHOWN)} left out)" if self.why else ""

    def line(self) -> str:
        """For the terminal: how many, which and why. A warning where text may have been in them."""
        loud = any(why not in HARMLESS for why in self.why.values())
        count = "1 file" if len(self) == 1 else f"{len(self)} files"
        return f"{'warning: ' if loud else ''}left out of the data: {count}: {self._listed(SHOWN)}"

    def record(self) -> dict[str, Any]:
        """For meta.json and result.json: how many for each reason, and their names, RECORDED of them at most."""
        return {"files": dict(Counter(self._sorted().values())), "names": list(self._sorted())[:RECORDED]}

    def _sorted(self) -> dict[str, str]:
        """What matters most comes first."""
        return dict(sorted(self.why.items(), key=lambda item: item[1] in HARMLESS))

    def _listed(self, most: int) -> str:
        named = [f"{printable(path)} ({why})" for path, why in list(self._sorted().items())[:most]]
        more = len(self) - len(named)
        return ", ".join(named) + (f" and {more} more" if more else "")


def why_left_out(file: SourceFile) -> str | None:
    """Why a file that a directory or a glob gave is not read; None for one that is."""
    kind, compression = kind_of(file.path.name)
    suffixes = [suffix.lower() for suffix in Path(file.path.name).suffixes[-1:]]
    if not file.size:
        return "empty"
    if suffixes and suffixes[0] in PACKED:
        return PACKED_WHY
    if suffixes and suffixes[0] in DOCUMENTS:
        return DOCUMENT_WHY
    if compression and file.path.with_suffix("").suffix.lower() in PACKED:
        return PACKED_WHY  # a .tar.gz would give its headers for text
    if kind == "parquet" or compression:
        return None
    with reading(file) as raw:
        head = raw.read(8192)
    if encoding := utf_16(head):
        return f"{encoding}, not UTF-8: iconv -f {encoding} -t UTF-8"
    return "binary" if b"\0" in head else None  # as git and grep tell


def say_and_record(left_out: LeftOut, prepared: Path, file: TextIO | None = None) -> None:
    """A line on `file`, the terminal's standard output by default, and an entry in the prepared directory's meta.json.

    The directory goes by what was read. So the same one may serve again where other files were left out beside it.
    """
    if left_out:
        print(left_out.line(), file=file, flush=True)
    meta_file = prepared / META
    with suppress(OSError, ValueError):  # a cache that may only be read, or whose damage its reader will name
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        if meta.get("left_out", {}) != (record := left_out.record() if left_out else {}):
            write_atomic(meta_file, json.dumps(meta | {"left_out": record}, indent=2, ensure_ascii=False) + "\n")
