"""The worker processes that turn text into token ids.

Processes, not the tokenizers library's threads: taking the ids out of its results holds Python's interpreter lock, and
its threads contend for one word cache. A worker ends when its parent does, however that ends.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.data.corpus import Piece
from bigtrain.data.shards import token_dtype


@dataclass(frozen=True)
class Encoded:
    """Token ids of some pieces, as the bytes of a shard; gzip_bytes of the held-out ones, each compressed alone."""

    data: bytes
    gzip_bytes: int


class Encoder:
    """Encodes pieces: each document becomes <eos> + its tokens."""

    def __init__(self, tokenizer_file: Path, eos_id: int, vocab_size: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_file(str(tokenizer_file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a document is text like any other
        self.eos = np.array([eos_id], dtype=token_dtype(vocab_size))

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        encodings = self.tokenizer.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        parts = []
        for piece, encoding in zip(pieces, encodings, strict=True):
            if piece.starts:
                parts.append(self.eos)
            parts.append(np.array(encoding.ids, dtype=self.eos.dtype))
        gzip_bytes = sum(len(gzip.compress(piece.text.encode(), 9)) for piece in pieces if piece.held_out)
        return Encoded(np.concatenate(parts).tobytes(), gzip_bytes)


class EncoderPool:
    """`workers` processes with an Encoder each; none for 0, where the work is done at once by the caller."""

    def __init__(self, workers: int, tokenizer_file: Path, eos_id: int, vocab_size: int) -> None:
        arguments = (tokenizer_file, eos_id, vocab_size)
        self._encoder = None if workers else Encoder(*arguments)
        self._pool = None
        if workers:
            # spawn: the library's threads and the progress bar's do not survive a fork
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, arguments)

    def submit(self, pieces: Sequence[Piece]) -> Future[Encoded]:
        if self._pool is not None:
            return self._pool.submit(_encode, pieces)
        assert self._encoder is not None
        done: Future[Encoded] = Future()
        done.set_result(self._encoder.encode(pieces))
        return done

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(tokenizer_file: Path, eos_id: int, vocab_size: int) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer_file, eos_id, vocab_size)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(pieces: Sequence[Piece]) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(pieces)
