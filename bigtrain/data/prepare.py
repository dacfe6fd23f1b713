"""Corpus -> tokenizer -> token shards in a cache directory, once per content and settings.

The directory is named by a fingerprint of everything that its bytes depend on. It is built as `<fingerprint>.partial`
and renamed when it is whole, so a directory without that suffix is always complete. Shards are finished one by one
(written, fsynced, then recorded), and a build that was killed goes on after its last finished shard: the corpus is
read again, which is cheap, and not encoded again.

This process reads, the workers encode, and this process writes, in order: what is written does not depend on how many
workers there are. A bounded number of batches is under way at once, which is what memory use comes down to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bigtrain.config import CausalLMConfig, Config, DataConfig, EncoderConfig, TextDataConfig
from bigtrain.data.control import control_tokens
from bigtrain.data.corpus import Corpus, Piece, find, hashed, open_corpus, shown
from bigtrain.data.encode import Encoded, EncoderPool, WorkerDied
from bigtrain.data.left_out import say_and_record
from bigtrain.data.locks import locked, writing
from bigtrain.data.shards import FORMAT, META, SPLITS, Prepared, load_prepared, shard_path, token_dtype
from bigtrain.data.tokenizer import (
    END_OF_TEXT,
    begin_id,
    check_vocabulary,
    load_tokenizer,
    tokenizer_identity,
    train_tokenizer,
    vocabulary_size,
)
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import fsync, write_atomic
from bigtrain.hardware import cores

BATCH_BYTES = 1 << 20  # text that a worker encodes at a time
BATCH_PIECES = 4096
SHARD_BYTES = 64 << 20  # text in a shard: what a kill costs at most
MOST_SHARDS = 4096  # of a split; a larger corpus has larger shards
INLINE_BYTES = 2 << 20  # below it starting workers takes longer than the work


def prepare(config: Config, progress: bool = False) -> Prepared:
    """Token shards of `config.data`, from the cache if they are there.

    Raises ConfigError for a source, tokenizer or cache directory that cannot be used, a tokenizer with more tokens than
    model.vocab_size, and a split shorter than one sequence of model.max_seq_len.
    """
    data = config.data
    cache = Path(data.cache_dir).expanduser()
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        found = _find(config)
        if not found.directory.exists():
            with locked(found.directory.with_suffix(".lock"), progress):
                if not found.directory.exists():
                    _build(
                        found.directory, found.corpus, data, found.tokenizer, found.for_encoder, found.begin, progress
                    )
    say_and_record(found.corpus.left_out, found.directory)
    prepared = load_prepared(found.directory)
    check_vocabulary(config, prepared.vocab_size)
    _check_length(config, prepared)
    return prepared


@dataclass(frozen=True)
class _Found:
    directory: Path  # where the shards are, or would be
    corpus: Corpus
    tokenizer: tuple[Any | None, int]  # if it is there already, and what ends a text
    for_encoder: bool
    begin: tuple[int, ...]


def _find(config: Config) -> _Found:
    data = config.data
    cache = Path(data.cache_dir).expanduser()
    for_encoder = isinstance(config.model, EncoderConfig)
    loaded, eos_id = load_tokenizer(data.tokenizer.path) if data.tokenizer.path else (None, 0)
    if loaded is not None:
        check_vocabulary(config, vocabulary_size(loaded))
    corpus = open_corpus(data, cache)
    begin = _begin(config, loaded, eos_id)
    fingerprint = _fingerprint(corpus, tokenizer_identity(data.tokenizer, loaded, for_encoder), begin)
    return _Found(cache / fingerprint, corpus, (loaded, eos_id), for_encoder, begin)


def prepared_at(config: Config) -> Path:
    """Where `prepare` finds or leaves the token shards: a directory named by the fingerprint of their content.

    Raises what that does.
    """
    cache = Path(config.data.cache_dir).expanduser()
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        return _find(config).directory


def prepare_held_out(config: Config, directory: Path, key: str) -> Prepared:
    """Token shards in `directory` of all the text that `config.data` names, none of it to train on; of a hub dataset
    the split that it keeps for that. `key` is the option that named it.

    Raises ConfigError as `prepare` does.
    """
    data = config.data
    assert isinstance(data, TextDataConfig)
    assert data.tokenizer.path is not None
    files, left_out = find(data, key, data.path or [])
    if not files:
        raise ConfigError(key, shown(data.path), f"holds no text file{left_out.also()}")
    corpus = Corpus([], 0.0, hashed(files, directory), data.text_field, hub_config=data.name, left_out=left_out)
    for_encoder = isinstance(config.model, EncoderConfig)
    tokenizer, eos_id = load_tokenizer(data.tokenizer.path, "RUN")
    begin = _begin(config, tokenizer, eos_id)
    _build(directory / "text", corpus, data, (tokenizer, eos_id), for_encoder, begin, progress=False)
    say_and_record(corpus.left_out, directory / "text", sys.stderr)  # a table is on standard output
    prepared = load_prepared(directory / "text")
    tokens, length = prepared.tokens["held_out"], config.model.max_seq_len
    if tokens < length + 1:
        problem = f"has {tokens} tokens, shorter than one sequence of {length} and the token after it"
        raise ConfigError(key, shown(data.path), problem, "give more text")
    return prepared


def _begin(config: Config, tokenizer: Any | None, eos_id: int) -> tuple[int, ...]:
    """What a document begins with after the end of the one before: of a model that goes on with texts, the token that
    its tokenizer begins them with, where that is not the one that ends them (Llama's is not, GPT-2's is)."""
    if tokenizer is None or not isinstance(config.task, CausalLMConfig):
        return ()
    bos_id = begin_id(tokenizer)
    return () if bos_id == eos_id else (bos_id,)


def _fingerprint(corpus: Corpus, tokenizer: dict[str, Any], begin: tuple[int, ...]) -> str:
    parts = {
        "format": FORMAT,
        "corpus": corpus.identity(),
        "tokenizer": tokenizer,
        "batch": (BATCH_BYTES, BATCH_PIECES, SHARD_BYTES, MOST_SHARDS),
    }
    parts |= {"begin": begin} if begin else {}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------- building


def _build(
    directory: Path,
    corpus: Corpus,
    data: DataConfig,
    loaded: tuple[Any | None, int],
    for_encoder: bool,
    begin: tuple[int, ...],
    progress: bool,
) -> None:
    partial = directory.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    corpus.settle_split()
    with _progress(progress) as advance:
        tokenizer, eos_id = _tokenizer(partial, corpus, data, loaded, for_encoder, advance)
        vocab_size = vocabulary_size(tokenizer)
        # A function of the corpus alone, so that a resumed build cuts where the first one did.
        shard_bytes = max(SHARD_BYTES, corpus.size // MOST_SHARDS)
        writers = {split: _ShardWriter(partial, split, token_dtype(vocab_size).itemsize) for split in SPLITS}
        workers = data.workers or cores()
        with ExitStack() as stack:
            inline = 0 < corpus.size <= INLINE_BYTES
            file, control = partial / "tokenizer.json", tuple(control_tokens(tokenizer))
            pool = EncoderPool(0 if inline else workers, file, (eos_id, *begin), vocab_size, control)
            stack.callback(pool.close)
            for writer in writers.values():
                stack.callback(writer.abandon)
            under_way: deque[tuple[_Batch, Future[Encoded]]] = deque()

            def write_one() -> None:
                batch, future = under_way.popleft()
                writers[batch.split].write(batch, _result(future))

            for batch in _batches(corpus.pieces(), shard_bytes):
                advance("tokenizing", corpus.position, corpus.size)
                if not writers[batch.split].has(batch.shard):
                    under_way.append((batch, pool.submit(batch.pieces)))
                    if len(under_way) > 2 * workers:
                        write_one()
            while under_way:
                write_one()
            for writer in writers.values():
                writer.finish()
    records = {split: writer.records for split, writer in writers.items()}
    held_out = records["held_out"]
    gzip_bytes, held_out_bytes = sum(r["gzip_bytes"] for r in held_out), sum(r["bytes"] for r in held_out)
    meta: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": directory.name,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        **{key: {split: sum(r[key] for r in records[split]) for split in SPLITS} for key in _COUNTS},
        "gzip_bits_per_byte": 8 * gzip_bytes / held_out_bytes if held_out_bytes else None,
        "shards": {split: [r["tokens"] for r in records[split]] for split in SPLITS},
        "blank_rows": corpus.blank_rows,
    }
    if corpus.blank_rows:
        print(f"left out of the data: {corpus.blank_rows} rows without text in their column", flush=True)
    if not any(meta["documents"].values()):
        raise ConfigError(*_blame(data), "holds no text")
    write_atomic(partial / META, json.dumps(meta, indent=2) + "\n")
    for record in partial.glob("*.json"):
        if record.name not in (META, "tokenizer.json"):
            record.unlink()
    fsync(partial)
    partial.rename(directory)
    fsync(directory.parent)


_COUNTS = ("tokens", "bytes", "documents")


def _tokenizer(
    partial: Path,
    corpus: Corpus,
    data: DataConfig,
    loaded: tuple[Any | None, int],
    for_encoder: bool,
    advance: Callable[[str, int, int], None],
) -> tuple[Any, int]:
    """The loaded tokenizer, the one that a killed build had trained already, or a new one; saved in `partial`."""
    from tokenizers import Tokenizer

    file = partial / "tokenizer.json"
    tokenizer: Any
    tokenizer, eos_id = loaded
    if tokenizer is None and file.exists():
        tokenizer = Tokenizer.from_file(str(file))
        return tokenizer, tokenizer.token_to_id(END_OF_TEXT)
    if tokenizer is None:

        def sample() -> Iterator[str]:
            wanted, read = data.tokenizer.train_mib << 20, 0
            for text in corpus.train_sample(wanted):
                read += len(text)
                advance("training the tokenizer", read, min(wanted, corpus.size))
                yield text

        tokenizer = train_tokenizer(sample(), data.tokenizer.vocab_size, for_encoder)
        eos_id = tokenizer.token_to_id(END_OF_TEXT)
    write_atomic(file, tokenizer.to_str(pretty=True))
    return tokenizer, eos_id


@dataclass(frozen=True)
class _Batch:
    split: str
    shard: int
    pieces: list[Piece]


def _batches(pieces: Iterable[Piece], shard_bytes: int) -> Iterator[_Batch]:
    """Pieces of one split together, about BATCH_BYTES of them, with the number of the shard that they go to.

    Where batches and shards end depends on the text alone, not on what has been encoded already.
    """
    waiting: dict[bool, list[Piece]] = {False: [], True: []}
    waiting_bytes = {False: 0, True: 0}
    shard_text = {False: 0, True: 0}
    shard = {False: 0, True: 0}

    def batch(held_out: bool) -> _Batch:
        done = _Batch(SPLITS[held_out], shard[held_out], waiting[held_out])
        shard_text[held_out] += waiting_bytes[held_out]
        if shard_text[held_out] >= shard_bytes:
            shard[held_out], shard_text[held_out] = shard[held_out] + 1, 0
        waiting[held_out], waiting_bytes[held_out] = [], 0
        return done

    for piece in pieces:
        split = piece.held_out
        waiting[split].append(piece)
        waiting_bytes[split] += piece.n_bytes
        if waiting_bytes[split] >= BATCH_BYTES or len(waiting[split]) >= BATCH_PIECES:
            yield batch(split)
    for split in (False, True):
        if waiting[split]:
            yield batch(split)


class _ShardWriter:
    """Writes one split's shards in order. A shard counts once its record (`train-00000.json`) exists."""

    def __init__(self, directory: Path, split: str, itemsize: int) -> None:
        self._directory, self._split, self._itemsize = directory, split, itemsize
        self.records: list[dict[str, int]] = []
        while (record := self._read_record(len(self.records))) is not None:
            self.records.append(record)
        self._finished_before = len(self.records)
        self._file: IO[bytes] | None = None
        self._shard = self._finished_before
        self._record: dict[str, int] = {}

    def has(self, shard: int) -> bool:
        """Whether an earlier build finished it."""
        return shard < self._finished_before

    def write(self, batch: _Batch, encoded: Encoded) -> None:
        if self._file is not None and batch.shard != self._shard:
            self.finish()
        if self._file is None:
            self._shard = batch.shard
            self._record = dict.fromkeys((*_COUNTS, "gzip_bytes"), 0)
            self._file = self._path().open("wb")
        self._file.write(encoded.data)
        self._record["tokens"] += len(encoded.data) // self._itemsize
        self._record["bytes"] += sum(piece.n_bytes for piece in batch.pieces)
        self._record["documents"] += sum(piece.starts for piece in batch.pieces)
        self._record["gzip_bytes"] += encoded.gzip_bytes

    def finish(self) -> None:
        """Make the shard under way durable, then record it."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            write_atomic(self._path().with_suffix(".json"), json.dumps(self._record))
            self.records.append(self._record)

    def abandon(self) -> None:
        """Remove the shard under way: it also frees the space of a disk that has run full."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # flushing what is left fails again on a full disk
                self._file.close()
            self._file = None
            self._path().unlink(missing_ok=True)

    def _path(self) -> Path:
        return shard_path(self._directory, self._split, self._shard)

    def _read_record(self, number: int) -> dict[str, int] | None:
        path = shard_path(self._directory, self._split, number)
        try:
            record: dict[str, int] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            return record if path.stat().st_size == record["tokens"] * self._itemsize else None
        except (OSError, ValueError, KeyError):
            return None


def _result(future: Future[Encoded]) -> Encoded:
    try:
        return future.result()
    except WorkerDied:
        raise BigtrainError(
            "data: a tokenizing process was killed, perhaps for want of memory; run the same command again to go on "
            "from the shards that are finished, with a smaller data.workers"
        ) from None


# --------------------------------------------------------------------------------------------------- checks


def _check_length(config: Config, prepared: Prepared) -> None:
    for split, way_out in (
        ("train", "give more text or lower model.max_seq_len"),
        ("held_out", "give more text, raise data.held_out or lower model.max_seq_len"),
    ):
        if prepared.tokens[split] < config.model.max_seq_len + 1:
            name = split.replace("_", "-")
            raise ConfigError(
                *_blame(config.data),
                f"its {name} part has {prepared.tokens[split]} tokens, shorter than one sequence of "
                f"model.max_seq_len={config.model.max_seq_len} and the token after it",
                way_out,
            )


def _blame(data: DataConfig) -> tuple[str, object]:
    path = getattr(data, "path", None)
    return ("data.path", path) if path else ("data.kind", data.kind)


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """advance(what, bytes so far, bytes in all): a bar for each `what`. 0 in all: not known."""
    if not shown:
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns)) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, total=bar.tasks[task].completed)
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done)

        yield advance
        for task in tasks.values():
            bar.update(task, total=bar.tasks[task].completed)
