"""Checkpoints and exported weights that only the holder of a key can read, or change unnoticed.

Each file becomes NAME.enc: a header, then chunks under AES-256-GCM in the STREAM construction (Hoang, Reyhanitabar,
Rogaway, Vizar 2015, eprint 2015/189): the nonce is the chunk's number and whether it is the last, so that chunks that
are changed, reordered, repeated, dropped or cut off do not open. Every file has a key of its own, HKDF-SHA256 of the
master key and 32 random bytes, and its name is authenticated, so that two files cannot change places.

encryption.json beside them says where the master key is found (a file's path or a variable's name), never the key.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bigtrain.config import EncryptionConfig
from bigtrain.errors import BigtrainError, ConfigError

SUFFIX = ".enc"
NOTE = "encryption.json"
KEY_BYTES, SALT_BYTES, TAG_BYTES = 32, 32, 16
CHUNK_BYTES = 2**20
_MAGIC = b"BTAESGCM\x01"
_HEADER = struct.Struct(f"<{len(_MAGIC)}sI{SALT_BYTES}s")  # magic and version, bytes in a chunk, salt
_LARGEST_CHUNK = 2**26
_PLAIN = "bigtrain-plain-"  # begins the names of private temporary directories: then the owner's process id


# --------------------------------------------------------------------------------------------------- the key


def read_key(settings: EncryptionConfig) -> bytes:
    """The 32 bytes that `key_file` or `key_env` gives, as 64 hexadecimal digits (a file may hold the bytes themselves).

    Raises ConfigError where it is missing, malformed, or a file that others may read.
    """
    if settings.key_file is not None:
        field, place = "train.encryption.key_file", settings.key_file
        path = Path(place).expanduser()
        try:
            raw = path.read_bytes()
            if path.stat().st_mode & 0o077:
                raise ConfigError(field, place, "others may read it", f"chmod 600 {place}")
        except OSError as error:
            raise ConfigError(field, place, f"cannot be read ({error.strerror})", _make_one(place)) from None
    elif settings.key_env is not None:
        field, place = "train.encryption.key_env", settings.key_env
        if place not in os.environ:
            raise ConfigError(field, place, "no such environment variable", "export it: 64 hexadecimal digits")
        raw = os.environ[place].encode()
    else:
        raise ConfigError("train.encryption.key_file", None, "no key is named", "or name train.encryption.key_env")
    if len(raw) == KEY_BYTES:
        return raw
    try:
        key = bytes.fromhex(raw.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(field, place, "holds no key of 256 bits (64 hexadecimal digits)", _make_one("key"))
    return key


def check(settings: EncryptionConfig) -> None:
    """Before a run: is the key there and the library? Nothing happens where no key is named. Raises ConfigError."""
    if settings.key_file is not None and settings.key_env is not None:
        raise ConfigError("train.encryption.key_env", settings.key_env, "a key_file is named too", "drop one")
    if enabled(settings):
        _aes(read_key(settings))


def enabled(settings: EncryptionConfig) -> bool:
    return settings.key_file is not None or settings.key_env is not None


def _make_one(place: str) -> str:
    return f"make one: (umask 077; openssl rand -hex 32 > {place})"


def _aes(key: bytes) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise ConfigError(
            "train.encryption", "on", "needs the package cryptography", "pip install 'bigtrain[encryption]'"
        ) from None
    return AESGCM(key)


def _derived(key: bytes, salt: bytes, purpose: bytes, length: int = KEY_BYTES) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=b"bigtrain " + purpose).derive(key)


def _key_id(key: bytes) -> str:
    """Tells a wrong key from a damaged file; says nothing about the key itself."""
    return _derived(key, b"", b"key id", 8).hex()


# ---------------------------------------------------------------------------------------------------- a file


def encrypt_file(path: Path, key: bytes, name: str) -> Path:
    """Write `path`.enc and remove `path`. `name` must be given again to open it. Raises OSError."""
    header = _HEADER.pack(_MAGIC, CHUNK_BYTES, os.urandom(SALT_BYTES))
    aes, sealed = _aes(_derived(key, header[-SALT_BYTES:], b"file")), path.with_name(path.name + SUFFIX)
    with open(path, "rb") as plain, open(sealed, "wb") as out:
        out.write(header)
        chunk, number = plain.read(CHUNK_BYTES), 0
        while True:
            following = plain.read(CHUNK_BYTES)
            out.write(aes.encrypt(_nonce(number, last=not following), chunk, header + name.encode()))
            if not following:
                break
            chunk, number = following, number + 1
        out.flush()
        os.fsync(out.fileno())
    path.unlink()
    return sealed


def decrypt_file(sealed: Path, key: bytes, name: str, out: Path) -> None:
    """Write what `sealed` holds to `out`. Raises BigtrainError at the first byte that is not as it was written."""
    from cryptography.exceptions import InvalidTag

    size = sealed.stat().st_size
    with open(sealed, "rb") as file, open(out, "wb") as plain:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise BigtrainError(f"{sealed}: is no encrypted file of this program, or was cut off")
        _, chunk_bytes, salt = _HEADER.unpack(header)
        if not 0 < chunk_bytes <= _LARGEST_CHUNK:
            raise BigtrainError(f"{sealed}: was changed since it was written (its header)")
        aes, number, left = _aes(_derived(key, salt, b"file")), 0, size - _HEADER.size
        while True:
            chunk = file.read(chunk_bytes + TAG_BYTES)
            left -= len(chunk)
            try:
                plain.write(aes.decrypt(_nonce(number, last=left <= 0), chunk, header + name.encode()))
            except InvalidTag:
                raise BigtrainError(
                    f"{sealed}: was changed or cut off since it was written (at chunk {number}); take another copy"
                ) from None
            if left <= 0:
                return
            number += 1


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


# ----------------------------------------------------------------------------------------------- a directory


def encrypt_directory(directory: Path, settings: EncryptionConfig, only: str = "*") -> None:
    """Replace the files below `directory` (whose names match `only`) by encrypted ones, and leave a note how to open
    them. Raises ConfigError for the key, OSError where the disk refuses."""
    key = read_key(settings)
    for path in sorted(path for path in directory.rglob(only) if path.is_file()):
        encrypt_file(path, key, str(path.relative_to(directory)))
    write_note(directory, settings, key)


def write_note(directory: Path, settings: EncryptionConfig, key: bytes) -> Path:
    """How to open the files of `directory`. Raises OSError."""
    note = {"format": "AES-256-GCM STREAM", "key_id": _key_id(key), **asdict(settings)}
    (directory / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
    return directory / NOTE


def is_encrypted(directory: Path) -> bool:
    return (directory / NOTE).is_file()


def key_of(directory: Path) -> bytes:
    """The key that opens `directory`: BIGTRAIN_KEY_FILE if set, else from where its note says.

    Raises ConfigError where there is none, BigtrainError where it is another one.
    """
    try:
        note = json.loads((directory / NOTE).read_text(encoding="utf-8"))
        place = EncryptionConfig(key_file=note["key_file"], key_env=note["key_env"])
        wanted = note["key_id"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BigtrainError(f"{directory / NOTE}: cannot be read: {error!r}") from None
    if elsewhere := os.environ.get("BIGTRAIN_KEY_FILE"):
        place = EncryptionConfig(key_file=elsewhere)
    key = read_key(place)
    _aes(key)  # the library is there
    if _key_id(key) != wanted:
        found = place.key_file or f"${place.key_env}"
        raise BigtrainError(
            f"{directory}: was encrypted with another key than that of {found} (key id {wanted}, here {_key_id(key)});"
            " name the right one: BIGTRAIN_KEY_FILE=FILE"
        )
    return key


def decrypt_into(directory: Path, out: Path, names: Iterable[str] | None = None) -> None:
    """Write the files of `directory` in the clear below `out`: all, or those of `names`. Raises BigtrainError."""
    key = key_of(directory)
    wanted = None if names is None else set(names)
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != NOTE):
        name = str(path.relative_to(directory)).removesuffix(SUFFIX)
        if wanted is not None and name not in wanted:
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith(SUFFIX):
            decrypt_file(path, key, name, out / name)
        else:
            shutil.copyfile(path, out / name)


def private_directory(size_bytes: int) -> Path:
    """A new directory that only this user can enter, in memory if there is room, else where temporary files go.

    Takes away those that killed processes of this user left.
    """
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1.1 * size_bytes
    parent = memory if roomy else Path(tempfile.gettempdir())
    for stale in parent.glob(f"{_PLAIN}*"):
        owner = stale.name.removeprefix(_PLAIN).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and stale.stat().st_uid == os.getuid():
            shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PLAIN}{os.getpid()}-", dir=parent))  # mode 0700


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[Path]:
    """`directory`, or if it is encrypted a private copy in the clear for as long as the body runs.

    Every rank calls it; one rank of each host opens the files for all there. Raises BigtrainError on all of them.
    """
    if not is_encrypted(directory):
        yield directory
        return
    import torch.distributed as dist

    together = dist.is_initialized() and dist.get_world_size() > 1
    opens = not together or os.environ.get("LOCAL_RANK", "0") == "0"
    copy, problem = None, None
    try:
        if opens:
            try:
                copy = private_directory(sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()))
                decrypt_into(directory, copy)
            except (BigtrainError, OSError) as error:
                problem = str(error)
        mine = (socket.gethostname(), str(copy) if copy else None, problem)
        found: list[Any] = [mine]
        if together:
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, mine)
        if problems := [text for _, _, text in found if text]:
            raise BigtrainError(problems[0])
        yield Path(next(path for host, path, _ in found if host == mine[0] and path))
        if together:
            dist.barrier()  # nobody reads any more
    finally:
        if copy is not None:
            shutil.rmtree(copy, ignore_errors=True)
