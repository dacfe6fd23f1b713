"""Preparing end to end: what lands on disk, the cache, kills, limits and every bad input."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from bigtrain.config import CausalLMConfig, Config, MaskedLMConfig, StdlibDataConfig, TokenizerConfig
from bigtrain.data import TokenShards, load_prepared, prepare
from bigtrain.data.corpus import open_corpus
from bigtrain.data.encode import Encoder
from bigtrain.errors import BigtrainError, ConfigError
from tests.data.samples import config, decoded, documents, shard_bytes

SCRIPT = Path(__file__).with_name("prepare_script.py")
SMALL = {"SHARD_BYTES": 256 << 10, "BATCH_BYTES": 32 << 10, "INLINE_BYTES": 0}  # many shards of a small corpus


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 900 kB of real text in 60 documents."""
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 4 MB of real text: seconds of work, so that a signal finds it half done."""
    path = tmp_path_factory.mktemp("corpus") / "large.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(5):
            file.writelines(json.dumps({"text": f"# {number}\n" + text}) + "\n" for text in documents(60))
    return path


@pytest.fixture(scope="module")
def tokenizer_file(rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(config(rows_file, tmp_path_factory.mktemp("tokenizer"))).tokenizer_file


def order(path: Path, cache: Path, tokenizer: Path, **more: object) -> list[str]:
    data = asdict(config(path, cache, tokenizer=TokenizerConfig(path=str(tokenizer))).data)
    return [sys.executable, str(SCRIPT), json.dumps({"data": data, **more})]


def run(command: list[str]) -> dict[str, Any]:
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    result: dict[str, Any] = json.loads(out.stdout)
    return result


# --------------------------------------------------------------------------------------------------- content


def test_shards_hold_the_documents(rows_file: Path, tmp_path: Path) -> None:
    settings = config(rows_file, tmp_path)
    prepared = prepare(settings)
    pieces = list(open_corpus(settings.data, tmp_path).pieces())
    for split in ("train", "held_out"):
        texts = [piece.text for piece in pieces if piece.held_out == (split == "held_out")]
        assert decoded(prepared, split) == texts
        assert prepared.documents[split] == len(texts)
        assert prepared.bytes[split] == sum(len(text.encode()) for text in texts)
        assert prepared.tokens[split] == len(TokenShards(prepared, split))
    held_out = [text.encode() for text in texts]
    bits = 8 * sum(len(gzip.compress(text, 9)) for text in held_out) / sum(map(len, held_out))
    assert prepared.gzip_bits_per_byte == pytest.approx(bits)
    assert prepared.vocab_size == 512
    assert load_prepared(prepared.directory) == prepared
    assert prepared.tokenizer_file.is_file()
    names = {path.suffix for path in prepared.directory.iterdir()} | {path.suffix for path in tmp_path.iterdir()}
    assert names <= {".json", ".bin", ".lock", ""}, "nothing temporary is left"


def test_a_cut_text_file_loses_no_text(tmp_path: Path) -> None:
    text = "\n\n".join(documents(30))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8", newline="")
    prepared = prepare(config(tmp_path / "book.txt", tmp_path / "cache"))
    lengths = sum(len(document) for split in ("train", "held_out") for document in decoded(prepared, split))
    assert lengths == len(text)
    assert all(document in text for document in decoded(prepared, "train")), "neighbouring pieces are one document"


def test_special_tokens_in_a_document_are_text(tmp_path: Path) -> None:
    texts = [f'{number} END = "<|endoftext|>"  # {"x" * 400}' for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare(config(tmp_path / "a.jsonl", tmp_path / "cache"))
    assert sorted(decoded(prepared, "train") + decoded(prepared, "held_out")) == sorted(texts)
    assert sum(prepared.documents.values()) == 40


@pytest.mark.parametrize("vocab_size", [70_000])
def test_large_vocabularies_take_four_bytes(
    rows_file: Path, tmp_path: Path, tokenizer_file: Path, vocab_size: int
) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_tokens([f"<extra {number}>" for number in range(vocab_size - 512)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    wide = prepare(config(rows_file, tmp_path / "wide", tokenizer=TokenizerConfig(path=str(tmp_path))))
    narrow = prepare(config(rows_file, tmp_path / "narrow", tokenizer=TokenizerConfig(path=str(tokenizer_file))))
    assert wide.vocab_size == vocab_size
    assert decoded(wide, "held_out") == decoded(narrow, "held_out")
    sizes = [path.stat().st_size for path in sorted(wide.directory.glob("*.bin"))]
    assert sizes == [2 * path.stat().st_size for path in sorted(narrow.directory.glob("*.bin"))]


@pytest.mark.parametrize(
    ("begin", "task"), [("<s>", CausalLMConfig()), ("<s>", MaskedLMConfig()), ("", CausalLMConfig())]
)
def test_a_document_begins_as_its_tokenizer_begins_one(
    rows_file: Path, tmp_path: Path, tokenizer_file: Path, begin: str, task: CausalLMConfig | MaskedLMConfig
) -> None:
    """For a model that goes on with texts; what masks words puts its own tokens around a text."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens(["</s>", *([begin] if begin else [])])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": begin or "</s>"}))
    wanted = replace(config(rows_file, tmp_path, tokenizer=TokenizerConfig(path=str(tmp_path))), task=task)
    prepared = prepare(wanted)
    texts = decoded(prepared, "train")
    assert len(texts) == prepared.documents["train"] > 1
    begins = bool(begin) and isinstance(task, CausalLMConfig)
    assert all(text.startswith("<s>") == begins for text in texts)
    assert all(text.count("<s>") == begins for text in texts)


def test_the_same_bytes_with_any_number_of_workers(rows_file: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    """Inline, one process and three: from processes of their own, so that hash seeds differ too."""
    prepared = []
    for name, workers, inline in (("a", 1, 1 << 30), ("b", 1, 0), ("c", 3, 0)):
        data = asdict(config(rows_file, tmp_path / name, tokenizer=TokenizerConfig(path=str(tokenizer_file))).data)
        command = {"data": data | {"workers": workers}, "constants": SMALL | {"INLINE_BYTES": inline}}
        result = run([sys.executable, str(SCRIPT), json.dumps(command)])
        assert result["torch"] is False
        prepared.append(load_prepared(result["directory"]))
    assert len(prepared[0].shards["train"]) > 2
    assert shard_bytes(prepared[0]) == shard_bytes(prepared[1]) == shard_bytes(prepared[2])
    assert prepared[0].gzip_bits_per_byte == prepared[2].gzip_bits_per_byte


def test_the_default_corpus(tmp_path: Path) -> None:
    """The standard library as it is on this machine, with its files' own gzip figure."""
    data = StdlibDataConfig(cache_dir=str(tmp_path), tokenizer=TokenizerConfig(vocab_size=300, train_mib=1))
    prepared = prepare(Config(data=data))
    assert sum(prepared.bytes.values()) > 5e6
    assert 0.02 < prepared.bytes["held_out"] / sum(prepared.bytes.values()) < 0.1
    assert 1.5 < (prepared.gzip_bits_per_byte or 0) < 2.6
    assert not any("site-packages" in str(file.path) for file in open_corpus(data, tmp_path).files)


# ----------------------------------------------------------------------------------------------------- cache


def test_the_second_time_nothing_is_encoded(rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, pieces: encoded.append(1) or encode(self, pieces))
    first = prepare(config(rows_file, tmp_path))
    assert encoded
    encoded.clear()
    assert prepare(config(rows_file, tmp_path)) == first
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(rows_file, moved)
    moved.rename(tmp_path / rows_file.name)
    assert prepare(config(tmp_path / rows_file.name, tmp_path)) == first, "content counts, not place or time"
    assert not encoded


def test_what_the_bytes_depend_on_is_in_the_fingerprint(rows_file: Path, tmp_path: Path) -> None:
    base = config(rows_file, tmp_path)
    changed = tmp_path / rows_file.name
    changed.write_text(rows_file.read_text(encoding="utf-8").replace("import", "impart", 1), encoding="utf-8")
    variants = [
        base,
        config(changed, tmp_path),
        config(rows_file, tmp_path, held_out=0.3),
        config(rows_file, tmp_path, tokenizer=TokenizerConfig(vocab_size=300, train_mib=1)),
        config(rows_file, tmp_path, held_out_path=str(changed)),
    ]
    assert len({prepare(variant).fingerprint for variant in variants}) == len(variants)
    same = replace(base, model=replace(base.model, dim=512, max_seq_len=32))
    assert prepare(same).fingerprint == prepare(base).fingerprint


def test_two_at_once_prepare_once(large_file: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    command = order(large_file, tmp_path, tokenizer_file, constants=SMALL)
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    directories = {json.loads(out)["directory"] for out, _ in results}
    assert len(directories) == 1
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 1


@pytest.mark.parametrize("damage", ["shorter", "gone", "meta"])
def test_a_damaged_directory_is_refused(rows_file: Path, tmp_path: Path, damage: str) -> None:
    prepared = prepare(config(rows_file, tmp_path))
    shard = prepared.directory / "train-00000.bin"
    if damage == "shorter":
        os.truncate(shard, shard.stat().st_size - 2)
    elif damage == "gone":
        shard.unlink()
    else:
        (prepared.directory / "meta.json").write_text('{"format": 1}')
    with pytest.raises(ConfigError, match=r"data\.prepared_dir=.*no whole prepared corpus.*delete it"):
        prepare(config(rows_file, tmp_path))


# ----------------------------------------------------------------------------------------------------- kills


def start_and_wait_for_shards(command: list[str], cache: Path, count: int = 3) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if len(list(cache.glob("*.partial/train-*.json"))) >= count:
            return process, next(cache.glob("*.partial"))
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("no shard within a minute")


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


def test_kill_and_resume_gives_the_same_bytes(large_file: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    whole = load_prepared(run(order(large_file, tmp_path / "a", tokenizer_file, constants=SMALL))["directory"])

    command = order(large_file, tmp_path / "b", tokenizer_file, constants=SMALL)
    process, partial = start_and_wait_for_shards(command, tmp_path / "b")
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert gone(workers), "a worker outlived its parent"
    assert not partial.with_suffix("").exists()
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("*.bin") if path.with_suffix(".json").exists()}
    assert len(finished) >= 3

    resumed = load_prepared(run(command)["directory"])
    for path, written in finished.items():
        assert (resumed.directory / path.name).stat().st_mtime_ns == written, "a finished shard was done again"
    assert len(finished) < len(resumed.shards["train"]) + len(resumed.shards["held_out"])
    assert shard_bytes(resumed) == shard_bytes(whole)
    assert replace(resumed, directory=whole.directory) == whole


def test_interrupt_leaves_no_process(large_file: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    process, _ = start_and_wait_for_shards(order(large_file, tmp_path, tokenizer_file, constants=SMALL), tmp_path, 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert gone(workers)
    assert all(path.with_suffix(".json").exists() for path in tmp_path.glob("*.partial/*.bin"))


def test_a_killed_worker_is_one_clear_line(large_file: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    command = order(large_file, tmp_path, tokenizer_file, constants=SMALL)
    process, partial = start_and_wait_for_shards(command, tmp_path, 1)
    workers = [
        child for child in psutil.Process(process.pid).children() if "resource_tracker" not in str(child.cmdline())
    ]
    workers[0].kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == BigtrainError.exit_code
    assert "a tokenizing process was killed" in stderr
    assert stderr.count("\n") == 1
    assert gone(workers)
    assert all(path.with_suffix(".json").exists() for path in partial.glob("*.bin"))
    run(command)


# -------------------------------------------------------------------------------------------------- disk full


def test_a_write_that_fails_is_one_clear_line(large_file: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    """A file size limit fails as a full disk does, without a disk to fill."""
    command = order(large_file, tmp_path, tokenizer_file, limits={"RLIMIT_FSIZE": 200_000})
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == ConfigError.exit_code
    assert out.stderr.startswith(f"data.cache_dir='{tmp_path}': cannot be written (File too large)")
    assert out.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.partial/*.bin")), "what was half written is gone"
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.suffix != ".partial"]


def test_a_full_disk_is_one_clear_line_and_can_be_resumed(
    large_file: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    """A real 1 MiB file system, mounted in a namespace of its own."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    probe = subprocess.run(
        [*namespace, "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip("needs a mount namespace: unshare (Debian package util-linux) and the right to use it")
    command = order(large_file, tmp_path / "full", tokenizer_file, constants=SMALL)
    (tmp_path / "full").mkdir()
    script = (
        'mount -t tmpfs -o size=1m none "$0" && "$@"; status=$?; ls "$0"/*.partial; cp -r "$0" "$0.copy"; exit $status'
    )
    out = subprocess.run(
        [*namespace, "sh", "-c", script, str(tmp_path / "full"), *command], capture_output=True, text=True, check=False
    )
    assert out.returncode == ConfigError.exit_code, out.stderr
    assert "cannot be written (No space left on device); free some space" in out.stderr
    assert out.stderr.count("\n") == 1
    names = out.stdout.split()
    assert "train-00000.bin" in names
    assert all(name.replace(".bin", ".json") in names for name in names if name.endswith(".bin"))

    (tmp_path / "full").rmdir()
    (tmp_path / "full.copy").rename(tmp_path / "full")
    resumed = load_prepared(run(command)["directory"])
    assert shard_bytes(resumed) == shard_bytes(
        load_prepared(run(order(large_file, tmp_path / "whole", tokenizer_file, constants=SMALL))["directory"])
    )


# ---------------------------------------------------------------------------------------------------- memory


def repeated(source: Path, path: Path, mib: int) -> Path:
    lines = source.read_text(encoding="utf-8")
    with path.open("w", encoding="utf-8") as file:
        for _ in range(max(1, (mib << 20) // len(lines.encode()))):
            file.write(lines)
    return path


def test_memory_does_not_grow_with_the_corpus(large_file: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    """Six times the corpus, the same memory, in the process that reads and writes and in those that encode."""
    small, large = (
        run(order(repeated(large_file, tmp_path / f"{mib}.jsonl", mib), tmp_path / "cache", tokenizer_file))
        for mib in (4, 24)
    )
    for process in ("own_kib", "worker_kib"):
        assert large[process] - small[process] < 12 << 10, f"{process}: {small[process]} -> {large[process]}"


@pytest.mark.soak
def test_a_corpus_larger_than_the_memory_allowed(large_file: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    """360 MiB of text; no process may have more than 256 MiB of data, and none comes near."""
    path = repeated(large_file, tmp_path / "huge.jsonl", 360)
    result = run(order(path, tmp_path / "cache", tokenizer_file, limits={"RLIMIT_DATA": 256 << 20}))
    assert max(result["own_kib"], result["worker_kib"]) >> 10 < 150
    assert sum(load_prepared(result["directory"]).bytes.values()) > 320 << 20


# ------------------------------------------------------------------------------------------------- bad input


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.bin").write_bytes(b"\0\1")
    rows = [json.dumps({"text": text}) + "\n" for text in documents(2)]
    (tmp_path / "two.jsonl").write_text("".join(rows))
    (tmp_path / "one.jsonl").write_text(rows[0])
    cases: list[tuple[object, dict[str, Any], str]] = [
        (tmp_path / "no.txt", {}, "no.txt': no such file or directory"),
        (tmp_path / "*.none", {}, "no such file or directory, and no file matches it"),
        ("no-such-org/no-such-set", {}, "no-such-set': no such file or directory, and the Hugging Face hub"),
        (tmp_path / "empty", {}, "empty': holds no text file"),
        (tmp_path / "binary", {}, "a.bin (binary) left out)"),
        (tmp_path / "empty.txt", {}, "empty.txt': holds no text"),
        (tmp_path / "blank.jsonl", {}, "blank.jsonl': holds no text"),
        (tmp_path / "short.txt", {}, "part has"),
        (tmp_path / "one.jsonl", {"held_out": 1e-9}, "its held-out part has 0 tokens"),
        (tmp_path / "one.jsonl", {"held_out": 1 - 1e-9}, "its train part has 0 tokens"),
        (tmp_path / "two.jsonl", {"held_out_path": str(tmp_path / "gone.txt")}, "data.held_out_path="),
        (tmp_path / "two.jsonl", {"text_field": "body"}, "there are: text"),
        ("/proc/self/mem", {}, "/proc/self/mem': cannot be read (Input/output error)"),
        (tmp_path / "two.jsonl", {"cache_dir": "/proc/nowhere"}, "data.cache_dir='/proc/nowhere': cannot be written"),
        (tmp_path / "two.jsonl", {"cache_dir": str(tmp_path / "empty.txt")}, "cannot be written (File exists)"),
    ]
    for path, data, problem in cases:
        cache = tmp_path / "cache" / str(len(list((tmp_path).iterdir())))
        settings = config(path, cache)
        for key, value in data.items():
            setattr(settings.data, key, value)
        with pytest.raises(ConfigError) as raised:
            prepare(settings)
        line = str(raised.value)
        assert problem in line, line
        assert "\n" not in line
    assert not list((tmp_path / "cache").rglob("*.bin")) or all(
        (path.parent / "meta.json").exists() for path in (tmp_path / "cache").rglob("*.bin")
    )


def test_too_short_names_the_sequence_length(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 4000)
    settings = config(tmp_path / "a.txt", tmp_path)
    settings.model.max_seq_len = 5000
    with pytest.raises(ConfigError, match=r"train part has \d+ tokens.*model\.max_seq_len=5000.*lower model"):
        prepare(settings)
    settings.model.max_seq_len = 8
    prepare(settings)


def test_vocabulary_larger_than_the_models(rows_file: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    settings = config(rows_file, tmp_path, tokenizer=TokenizerConfig(path=str(tokenizer_file)))
    settings.model.vocab_size = 511
    with pytest.raises(ConfigError, match=r"model\.vocab_size=511: smaller than the tokenizer's vocabulary of 512"):
        prepare(settings)
    assert not list(tmp_path.glob("*.partial")), "found before any work"
    settings.model.vocab_size = 512
    assert prepare(settings).vocab_size == 512


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A directory that all may read, as a user whom permissions bind: root becomes somebody else."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        (Path(directory) / "secret.txt").write_text("text")
        (Path(directory) / "secrets").mkdir()
        for name in ("secret.txt", "secrets"):
            os.chmod(Path(directory) / name, 0)
        if os.getuid() == 0:
            os.seteuid(65534)
        yield Path(directory)
        os.seteuid(os.getuid())


@pytest.mark.parametrize(
    ("path", "blamed"),
    [
        ("secret.txt", "secret.txt"),
        ("*.txt", "secret.txt"),
        ("secrets", "secrets"),
        ("secrets/a.txt", "secrets/a.txt"),
        ("", "secrets"),
    ],
)
def test_what_may_not_be_read(nobody: Path, path: str, blamed: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_corpus(config(nobody / path, nobody).data, nobody)
    assert str(raised.value) == f"data.path='{nobody / blamed}': cannot be read (Permission denied)"


def test_progress_is_shown(rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config(rows_file, tmp_path), progress=True)
    shown = capsys.readouterr().out
    assert "training the tokenizer" in shown
    assert "tokenizing" in shown
    prepare(config(rows_file, tmp_path / "again"), progress=False)
    assert capsys.readouterr().out == ""


def test_importing_data_does_not_import_torch() -> None:
    script = (
        "import sys, bigtrain.data, bigtrain.data.sampler; print('torch' in sys.modules, 'datasets' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out == "False False\n"
