"""The worker processes that turn text into token ids.

Processes, not the tokenizers library's threads: taking the ids out of its results holds Python's interpreter lock, and
its threads contend for one word cache. A worker ends when its parent does, however that ends.
"""

from __future__ import annotations

import contextlib
import gzip
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias, cast

import numpy as np

from bigtrain.data.control import text_reader
from bigtrain.data.corpus import Piece
from bigtrain.data.shards import token_dtype

_Pipe: TypeAlias = "Connection[Any, Any]"


@dataclass(frozen=True)
class Encoded:
    """Token ids of some pieces, as the bytes of a shard; gzip_bytes of the held-out ones, each compressed alone."""

    data: bytes
    gzip_bytes: int


class Encoder:
    """Encodes pieces: each document becomes `begin`, the token ids that a document begins with, + its tokens. None of
    those is one of the `control` tokens."""

    def __init__(self, tokenizer_file: Path, begin: tuple[int, ...], vocab_size: int, control: tuple[str, ...]) -> None:
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(tokenizer_file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = text_reader(tokenizer, control)  # "<|endoftext|>" inside a document is text like any other
        self.begin = np.array(begin, dtype=token_dtype(vocab_size))

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        encodings = self.tokenizer.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        parts = []
        for piece, encoding in zip(pieces, encodings, strict=True):
            if piece.starts:
                parts.append(self.begin)
            parts.append(np.array(encoding.ids, dtype=self.begin.dtype))
        gzip_bytes = sum(len(gzip.compress(piece.text.encode(), 9)) for piece in pieces if piece.held_out)
        return Encoded(np.concatenate(parts).tobytes(), gzip_bytes)


class WorkerDied(Exception):
    """A worker process ended while it had work."""


class EncoderPool:
    """`workers` processes with an Encoder each; none for 0, where the work is done at once by the caller.

    Each worker has a pipe of its own and a thread here that feeds it. ProcessPoolExecutor shares one result pipe: a
    worker that is killed inside a write leaves half a message there, for which its reader then waits for ever. Here
    the pipe of a dead worker just ends.
    """

    def __init__(
        self, workers: int, tokenizer_file: Path, begin: tuple[int, ...], vocab_size: int, control: tuple[str, ...]
    ) -> None:
        arguments = (tokenizer_file, begin, vocab_size, control)
        self._encoder = None if workers else Encoder(*arguments)
        self._threads = ThreadPoolExecutor(workers) if workers else None
        self._workers: list[tuple[SpawnProcess, _Pipe]] = []
        self._idle: SimpleQueue[_Pipe] = SimpleQueue()
        # spawn: the library's threads and the progress bar's do not survive a fork
        context = multiprocessing.get_context("spawn")
        for _ in range(workers):
            pipe, far_end = context.Pipe()
            process = context.Process(target=_work, args=(far_end, *arguments), daemon=True)
            process.start()
            far_end.close()  # so that the worker's end is the only one, and its death the end of the pipe
            self._workers.append((process, pipe))
            self._idle.put(pipe)

    def submit(self, pieces: Sequence[Piece]) -> Future[Encoded]:
        if self._threads is not None:
            return self._threads.submit(self._encode, pieces)
        assert self._encoder is not None
        done: Future[Encoded] = Future()
        done.set_result(self._encoder.encode(pieces))
        return done

    def close(self) -> None:
        """End the workers; what they have under way is lost."""
        for process, _ in self._workers:
            process.terminate()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for process, pipe in self._workers:
            process.join()
            pipe.close()

    def _encode(self, pieces: Sequence[Piece]) -> Encoded:
        pipe = self._idle.get()
        try:
            pipe.send(pieces)
            answer = pipe.recv()
        except (EOFError, OSError):
            raise WorkerDied from None
        finally:
            self._idle.put(pipe)  # of a dead worker too: it fails the next batch at once
        if isinstance(answer, Exception):
            raise answer
        return cast(Encoded, answer)


def _work(pipe: _Pipe, tokenizer_file: Path, begin: tuple[int, ...], vocab_size: int, control: tuple[str, ...]) -> None:
    """A worker's life: it ends when the parent closes the pipe, or ends itself, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = Encoder(tokenizer_file, begin, vocab_size, control)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pieces = pipe.recv()
            try:
                answer: Encoded | Exception = encoder.encode(pieces)
            except Exception as error:  # the parent raises it
                answer = error
            pipe.send(answer)
