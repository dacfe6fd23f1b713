"""How fast a corpus is prepared, against the tokenizers library's own batch encoding, and how fast it is read back.

    python benchmarks/data_throughput.py [--rounds 3] [--copies 4]

Both sides encode the same text (the standard library, `--copies` times, one jsonl file) with the same BPE, in
turns, because a machine's speed drifts between minutes:

- library: Tokenizer.encode_batch over all documents, which are in memory already; its results are dropped;
- prepare: bigtrain's prepare() from the file on disk to fsynced shards, start of its processes included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bigtrain.config import Config, StdlibDataConfig, TextDataConfig, TokenizerConfig
from bigtrain.data import Prepared, prepare
from bigtrain.data.corpus import open_corpus

LIBRARY = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
documents = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
start = time.perf_counter()
tokenizer.encode_batch(documents, add_special_tokens=False)
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=4, help="of the standard library in the corpus")
    parser.add_argument("--workers", type=int, default=None, help="processes that encode; default: one per core")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), arguments.rounds, arguments.copies, arguments.workers)


def run(directory: Path, rounds: int, copies: int, workers: int | None) -> None:
    stdlib = Config(data=StdlibDataConfig(cache_dir=str(directory / "stdlib")))
    tokenizer = prepare(stdlib).tokenizer_file
    corpus = directory / "corpus.jsonl"
    n_bytes = write_corpus(corpus, directory, copies)
    library, ours = [], []
    for number in range(rounds):
        library.append(n_bytes / library_seconds(tokenizer, corpus) / 1e6)
        data = TextDataConfig(
            path=str(corpus),
            cache_dir=str(directory / f"cache-{number}"),
            tokenizer=TokenizerConfig(path=str(tokenizer)),
            workers=workers,
        )
        start = time.perf_counter()
        prepared = prepare(Config(data=data))
        ours.append(n_bytes / (time.perf_counter() - start) / 1e6)
        print(f"round {number + 1}: library {library[-1]:.2f} MB/s, prepare {ours[-1]:.2f} MB/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(ours, library, strict=True))
    print(f"corpus {n_bytes / 1e6:.1f} MB, BPE {prepared.vocab_size}, {os.cpu_count()} cores")
    print(f"median: library {statistics.median(library):.2f} MB/s, prepare {statistics.median(ours):.2f} MB/s")
    print(f"prepare / library, median of rounds: {ratio:.2f}")
    for isolate in (False, True):
        what = ", document ids" if isolate else ""
        print(f"loader, one rank, T=512{what}: {loader_tokens_per_second(prepared, isolate) / 1e6:.1f} M tokens/s")


def write_corpus(path: Path, cache: Path, copies: int) -> int:
    """The standard library as jsonl, one row per file; returns the bytes of text."""
    n_bytes = 0
    with path.open("w", encoding="utf-8") as file:
        for _ in range(copies):
            for piece in open_corpus(StdlibDataConfig(), cache).pieces():
                file.write(json.dumps({"text": piece.text}) + "\n")
                n_bytes += piece.n_bytes
    return n_bytes


def library_seconds(tokenizer: Path, corpus: Path) -> float:
    command = [sys.executable, "-c", LIBRARY, str(tokenizer), str(corpus)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def loader_tokens_per_second(prepared: Prepared, isolate_documents: bool, seconds: float = 2.0) -> float:
    from bigtrain.data.loader import TrainLoader

    loader = TrainLoader(prepared, 512, 32, 8, 0, 0, 1, isolate_documents)
    step, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        loader.batches(step)
        step += 1
    return step * 32 * 512 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
