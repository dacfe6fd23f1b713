"""What makes a checkpoint trustworthy: a manifest with the size and SHA-256 of every file, and its own.

Of 400 random bit flips in a torch checkpoint nearly all load without a word, so nothing is read before its hash is
checked. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bigtrain.files import fsync, printable

MANIFEST = "manifest.json"
FORMAT = 2
CHUNK_BYTES = 2**20
HASHING_THREADS = 4  # of one rank; SHA-256 takes about a second per GB and core, and releases the GIL

File = dict[str, Any]  # {"bytes": size, "sha256": hex}

_UNSEALED = "0" * 64
_SEAL = re.compile(r'"manifest_sha256": "([0-9a-f]{64})"\n\}\n\Z')


def sha256(path: Path) -> str:
    """Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe(directory: Path, names: Iterable[str]) -> dict[str, File]:
    """{name: size and hash} of files that have just been written, each forced to the disk.

    Hashed before the flush, while they are still in the page cache. Raises OSError where the disk refuses.
    """

    def one(name: str) -> tuple[str, File]:
        path = directory / name
        found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        fsync(path)
        return name, found

    with ThreadPoolExecutor(HASHING_THREADS, "hashing") as pool:
        return dict(pool.map(one, names))


def below(directory: Path) -> list[str]:
    """Every file under `directory` but its manifest, as relative names in order."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and path != directory / MANIFEST
    )


def seal(directory: Path, facts: dict[str, Any], files: dict[str, File] | None = None) -> None:
    """Write the manifest, the last file of a checkpoint; `files` None: describe all that are there.

    It is JSON for people to read. Its last line is the SHA-256 of its own bytes, with zeros in that place.
    """
    files = describe(directory, below(directory)) if files is None else files
    ordered = {"format": FORMAT} | facts | {"files": dict(sorted(files.items())), "manifest_sha256": _UNSEALED}
    text = printable(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    seal = hashlib.sha256(text.encode()).hexdigest()
    (directory / MANIFEST).write_text(_SEAL.sub(f'"manifest_sha256": "{seal}"\n}}\n', text), encoding="utf-8")
    for path in {directory / MANIFEST, *((directory / name).parent for name in files), directory}:
        fsync(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises ValueError, in a few words, for one that is missing, damaged or of another format."""
    try:
        text = (directory / MANIFEST).read_bytes().decode()
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{MANIFEST}: damaged (not text)") from None
    found = _SEAL.search(text)
    if found is None:
        raise ValueError(f"{MANIFEST}: damaged or of another version (no checksum at its end)")
    unsealed = text[: found.start(1)] + _UNSEALED + text[found.end(1) :]
    if hashlib.sha256(unsealed.encode()).hexdigest() != found[1]:
        raise ValueError(f"{MANIFEST}: damaged (its checksum differs)")
    manifest: dict[str, Any] = json.loads(text)
    if manifest["format"] != FORMAT:
        raise ValueError(f"{MANIFEST}: format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def misfits(directory: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """{file: what is wrong} as far as it shows without reading the files: missing, of another size, not listed."""
    problems = {}
    for name, expected in manifest["files"].items():
        try:
            size = os.stat(directory / name).st_size
        except OSError as error:
            problems[name] = "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
            continue
        if size != expected["bytes"]:
            problems[name] = f"{size} bytes, not {expected['bytes']}"
    return problems | dict.fromkeys(sorted(set(below(directory)) - manifest["files"].keys()), "not in the manifest")


def damaged(directory: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """{file: what is wrong} of a checkpoint, every byte read; empty if it is as it was saved.

    `names`: only these files are read (the manifest always is).
    """
    try:
        manifest = read_manifest(directory)
    except ValueError as error:
        return {MANIFEST: str(error).removeprefix(f"{MANIFEST}: ")}
    wanted = set(manifest["files"]) if names is None else set(names)
    problems = {name: what for name, what in misfits(directory, manifest).items() if names is None or name in wanted}

    def one(name: str) -> tuple[str, str | None]:
        try:
            same = sha256(directory / name) == manifest["files"][name]["sha256"]
        except OSError as error:
            return name, f"cannot be read ({error.strerror})"
        return name, None if same else "SHA-256 differs"

    with ThreadPoolExecutor(HASHING_THREADS, "hashing") as pool:
        read = pool.map(one, sorted(wanted & manifest["files"].keys() - problems.keys()))
        return problems | {name: what for name, what in read if what}


def listed(problems: dict[str, str], shown: int = 3) -> str:
    """The first few on one line."""
    parts = [f"{name}: {what}" for name, what in list(problems.items())[:shown]]
    return "; ".join(parts) + (f"; and {len(problems) - shown} more" if len(problems) > shown else "")
