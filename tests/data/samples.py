"""Real text to prepare: parts of the standard library, which every machine has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from bigtrain.config import Config, DecoderConfig, TextDataConfig, TokenizerConfig
from bigtrain.data import Prepared, TokenShards

ROOT = Path(__file__).parents[2]  # for processes that import the tests
STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = ("json", "email", "http", "logging", "asyncio")


def documents(count: int = 40) -> list[str]:
    files = [file for package in PACKAGES for file in sorted((STDLIB / package).glob("*.py"))]
    return [text for file in files if (text := file.read_text(encoding="utf-8")).strip()][:count]


def config(path: object, cache: Path, **data: object) -> Config:
    """Small vocabulary, short sequences: what a test can afford."""
    data.setdefault("tokenizer", TokenizerConfig(vocab_size=512, train_mib=1))
    data.setdefault("held_out", 0.2)
    given = [str(p) for p in path] if isinstance(path, list) else str(path)
    settings = TextDataConfig(path=given, cache_dir=str(cache), workers=2, **data)  # type: ignore[arg-type]
    return Config(model=DecoderConfig(max_seq_len=64), data=settings)


def decoded(prepared: Prepared, split: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_file))
    shards = TokenShards(prepared, split)
    found: list[list[int]] = []
    for token in shards.window(0, len(shards)).tolist():
        if token == prepared.eos_id:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in found]


def shard_bytes(prepared: Prepared) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(prepared.directory.iterdir()) if path.suffix == ".bin"}
