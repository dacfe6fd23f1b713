"""The tokenizer: a byte-level BPE trained on the corpus, or one that exists already.

Byte-level BPE (Radford et al. 2019, GPT-2) through the tokenizers library: every text can be encoded, and nothing is
unknown. `<|endoftext|>` begins each document.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigtrain.config import Config, TokenizerConfig
from bigtrain.data import hub
from bigtrain.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
# In the order they are looked for, where the tokenizer's own files do not say which.
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>", "[SEP]")

# Explicit, or the library warns on standard error whenever the command starts a process later.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


# What encoders need besides, by the names that tokenizers have for them.
SPECIAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


def train_tokenizer(texts: Iterable[str], vocab_size: int, for_encoder: bool = False) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens, <|endoftext|> the first; the same texts give the same one.

    `for_encoder` adds BERT's special tokens, and puts [CLS] and [SEP] around what is encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *(names[0] for names in SPECIAL.values())] if for_encoder else [END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if for_encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
        )
    return tokenizer


def special_ids(tokenizer: Any) -> dict[str, int]:
    """{pad, unk, cls, sep, mask, eos: id}, of those that the tokenizer has."""
    found = {}
    for name, spellings in SPECIAL.items():
        ids = [tokenizer.token_to_id(spelling) for spelling in spellings]
        if known := [number for number in ids if number is not None]:
            found[name] = known[0]
    ends = [tokenizer.token_to_id(token) for token in END_TOKENS]
    if known := [number for number in ends if number is not None]:
        found["eos"] = known[0]
    return found


def require_special(found: dict[str, int], names: tuple[str, ...], path: str | None) -> None:
    """Raises ConfigError if a tokenizer has not the special tokens that a task needs."""
    for name in names:
        if name not in found:
            raise ConfigError(
                "data.tokenizer.path", path,
                f"this tokenizer has no {SPECIAL.get(name, END_TOKENS)[0]} token, which the task needs",
                "take one of the same kind of model, or leave it null to train one",
            )  # fmt: skip


def load_tokenizer(path: str, key: str = "data.tokenizer.path") -> tuple[Any, int]:
    """(tokenizer, id of its end-of-text token) from what `find_tokenizer` takes.

    Raises ConfigError as that does, and if the tokenizer has no end-of-text token.
    """
    tokenizer, file = _find(path, key)
    for token in (_named_end_token(file.parent), *END_TOKENS):
        if token is not None and (eos_id := tokenizer.token_to_id(token)) is not None:
            return tokenizer, eos_id
    wanted = f"one of {', '.join(END_TOKENS)} is needed in its vocabulary"
    raise ConfigError(key, path, "this tokenizer has no end-of-text token", wanted)


def find_tokenizer(path: str, key: str = "data.tokenizer.path") -> Any:
    """A tokenizer.json, or the one in a run, a Hugging Face directory or hub model.

    Raises ConfigError if there is none there or it cannot be read.
    """
    return _find(path, key)[0]


def _find(path: str, key: str) -> tuple[Any, Path]:
    from tokenizers import Tokenizer

    given = Path(path).expanduser()
    candidates = (given, given / "tokenizer.json", given / "tokenizer" / "tokenizer.json")
    file = next((file for file in candidates if file.is_file()), None)
    if file is None and given.exists():
        raise ConfigError(key, path, "no tokenizer.json in this directory", "a tokenizer saved by tokenizers is wanted")
    file = file or hub.tokenizer_file(path, key)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(key, path, f"{file.name} is no tokenizer ({str(error).splitlines()[0]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, file


def vocabulary_size(tokenizer: Any) -> int:
    """Rows an embedding needs: the highest id + 1, which is more than the number of tokens where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_vocabulary(config: Config, vocab_size: int) -> None:
    """Raises ConfigError if model.vocab_size is set and smaller than the tokenizer's."""
    if config.model.vocab_size is not None and config.model.vocab_size < vocab_size:
        raise ConfigError(
            "model.vocab_size", config.model.vocab_size, f"smaller than the tokenizer's vocabulary of {vocab_size}",
            "raise it or leave it null to follow the tokenizer",
        )  # fmt: skip


def tokenizer_identity(settings: TokenizerConfig, loaded: Any | None, for_encoder: bool) -> dict[str, Any]:
    """What the token ids depend on, for the fingerprint."""
    import tokenizers

    if loaded is not None:
        return {"tokenizer": loaded.to_str(), "library": tokenizers.__version__}
    trained = {"vocab_size": settings.vocab_size, "train_mib": settings.train_mib, "library": tokenizers.__version__}
    return trained | ({"for_encoder": True} if for_encoder else {})


def _named_end_token(directory: Path) -> str | None:
    """The eos_token that a Hugging Face directory's tokenizer_config.json names."""
    try:
        token = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
