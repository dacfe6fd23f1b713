"""Encrypted checkpoints: whoever has the key reads what was written, and nobody else reads or changes anything."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain import cli, encryption
from bigtrain.config import EncryptionConfig
from bigtrain.encryption import _HEADER, CHUNK_BYTES, TAG_BYTES
from bigtrain.errors import BigtrainError, ConfigError
from tests.runs import TINY, bigtrain, losses

KEY = bytes(range(32))
HEAD = _HEADER.size
SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES


@pytest.fixture
def key(tmp_path: Path) -> EncryptionConfig:
    path = tmp_path / "key"
    path.write_text(KEY.hex() + "\n")
    path.chmod(0o600)
    return EncryptionConfig(key_file=str(path))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_a_file_comes_back(tmp_path: Path, size: int) -> None:
    path, data = tmp_path / "a.bin", os.urandom(size)
    path.write_bytes(data)
    sealed = encryption.encrypt_file(path, KEY, "a.bin")
    assert not path.exists()
    assert size < 16 or data[:16] not in sealed.read_bytes()
    encryption.decrypt_file(sealed, KEY, "a.bin", path)
    assert path.read_bytes() == data


TAMPERING: dict[str, Callable[[bytearray], bytes]] = {
    "a bit in the data": lambda data: _flipped(data, HEAD + 5),
    "a bit in the last tag": lambda data: _flipped(data, len(data) - 1),
    "a bit in the salt": lambda data: _flipped(data, HEAD - 1),
    "a bit in the chunk size": lambda data: _flipped(data, 10),
    "a bit in the magic": lambda data: _flipped(data, 0),
    "cut between chunks": lambda data: bytes(data[: HEAD + 2 * SEALED_CHUNK]),
    "cut within a chunk": lambda data: bytes(data[: HEAD + SEALED_CHUNK + 7]),
    "cut to the header": lambda data: bytes(data[:HEAD]),
    "emptied": lambda data: b"",
    "two chunks swapped": lambda data: bytes(
        data[:HEAD] + data[HEAD + SEALED_CHUNK : HEAD + 2 * SEALED_CHUNK] + data[HEAD : HEAD + SEALED_CHUNK]
        + data[HEAD + 2 * SEALED_CHUNK :]
    ),
    "a chunk twice": lambda data: bytes(data[: HEAD + SEALED_CHUNK] + data[HEAD:]),
    "a chunk dropped": lambda data: bytes(data[:HEAD] + data[HEAD + SEALED_CHUNK :]),
    "something appended": lambda data: bytes(data) + b"x",
}  # fmt: skip


def _flipped(data: bytearray, at: int) -> bytes:
    data[at] ^= 1
    return bytes(data)


@pytest.mark.parametrize("what", TAMPERING)
def test_tampering_is_detected(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(os.urandom(2 * CHUNK_BYTES + 100))
    sealed = encryption.encrypt_file(path, KEY, "a.bin")
    sealed.write_bytes(TAMPERING[what](bytearray(sealed.read_bytes())))
    with pytest.raises(BigtrainError, match=r"a\.bin\.enc"):
        encryption.decrypt_file(sealed, KEY, "a.bin", path)


def test_files_cannot_change_places(tmp_path: Path, key: EncryptionConfig) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text(name)
    encryption.encrypt_directory(folder, key)
    (folder / "a.enc").rename(folder / "c.enc")
    (folder / "b.enc").rename(folder / "a.enc")
    with pytest.raises(BigtrainError, match=r"a\.enc: was changed"):
        encryption.decrypt_into(folder, out)


def test_the_key(tmp_path: Path, key: EncryptionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY.hex())
    assert encryption.read_key(key) == encryption.read_key(EncryptionConfig(key_env="A_KEY")) == KEY
    assert key.key_file is not None
    Path(key.key_file).chmod(0o644)
    with pytest.raises(ConfigError, match=r"key_file=.*others may read it; chmod 600"):
        encryption.read_key(key)
    Path(key.key_file).chmod(0o600)
    Path(key.key_file).write_text("password")
    with pytest.raises(ConfigError, match="holds no key of 256 bits"):
        encryption.read_key(key)
    with pytest.raises(ConfigError, match="cannot be read"):
        encryption.read_key(EncryptionConfig(key_file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="no such environment variable"):
        encryption.read_key(EncryptionConfig(key_env="NO_SUCH_KEY"))


def test_a_private_directory_is_private_and_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    first = encryption.private_directory(10)
    assert first.stat().st_mode & 0o777 == 0o700
    left = first.with_name(f"{encryption._PLAIN}{2**22 + 1}-x")  # of a process that cannot be
    left.mkdir()
    second = encryption.private_directory(10)
    assert first.is_dir()
    assert not left.exists()
    for path in (first, second):
        path.rmdir()


def test_a_run_from_end_to_end(
    tmp_path: Path, key: EncryptionConfig, data_cache: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two ranks save, resume and continue on the curve of the run that was not encrypted; then others read it."""
    shared = [*TINY, f"data.cache_dir={data_cache}", "train.eval_every=0", "logger=quiet"]
    settings = [*shared, f"train.encryption.key_file={key.key_file}", "launch.private=true"]
    run, plain = tmp_path / "run", tmp_path / "plain"
    bigtrain("train", *settings, f"run_dir={run}", "train.steps=2", "schedule=constant")
    (checkpoint,) = (run / "checkpoints").iterdir()
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".enc")} == {"manifest.json", "encryption.json"}
    assert "model.safetensors.enc" in files
    bigtrain("train", *settings, f"run_dir={run}", "train.steps=4", "schedule=constant", "resume=required")
    bigtrain("train", *shared, f"run_dir={plain}", "train.steps=4", "schedule=constant")
    assert losses(run) == losses(plain)
    for path in (run, *run.rglob("*")):  # launch.private, of all that two sessions wrote
        assert path.stat().st_mode & 0o077 == 0, path
    for path in run.rglob("*"):
        assert path.is_dir() or (KEY not in path.read_bytes() and KEY.hex().encode() not in path.read_bytes()), path
    assert not list(Path("/dev/shm").glob(f"{encryption._PLAIN}*"))

    def said(*arguments: str) -> tuple[int, str, str]:
        status = cli._run(list(arguments))
        return status, *capsys.readouterr()

    write = ("--prompt", "import", "--max-new-tokens", "5", "--device", "cpu")
    assert said("generate", str(run), *write)[:2] == said("generate", str(plain), *write)[:2]
    assert said("evaluate", str(run), "--device", "cpu")[0] == 0
    assert said("export", str(run), "--out", str(tmp_path / "hf"))[0] == 0
    assert said("export", str(run), "--encrypt", "--out", str(tmp_path / "closed"))[0] == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert not (tmp_path / "closed" / "model.safetensors").exists()
    assert said("decrypt", str(tmp_path / "closed"), "--out", str(tmp_path / "open"))[0] == 0
    opened = (tmp_path / "open" / "model.safetensors").read_bytes()
    assert opened == (tmp_path / "hf" / "model.safetensors").read_bytes()

    other = tmp_path / "other"
    other.write_text(os.urandom(32).hex())
    other.chmod(0o600)
    monkeypatch.setenv("BIGTRAIN_KEY_FILE", str(other))
    status, _, error = said("generate", str(run), *write)
    assert (status, error.count("\n")) == (1, 1)
    assert "was encrypted with another key" in error
    monkeypatch.delenv("BIGTRAIN_KEY_FILE")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    sealed = newest / "model.safetensors.enc"
    sealed.write_bytes(_flipped(bytearray(sealed.read_bytes()), 1000))
    status, _, error = said("generate", str(run), *write)
    assert (status, error.count("\n")) != (0, 0)
    shutil.rmtree(run)
