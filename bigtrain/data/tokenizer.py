"""The tokenizer: a byte-level BPE trained on the corpus, or one that exists already.

Byte-level BPE (Radford et al. 2019, GPT-2) through the tokenizers library: every text can be encoded, and nothing is
unknown. `<|endoftext|>` begins each document.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigtrain.config import Config, TokenizerConfig
from bigtrain.data import hub
from bigtrain.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
# In the order they are looked for, where the tokenizer's own files do not say which.
BEGIN_TOKENS = ("<|begin_of_text|>", "<bos>", "<s>", "[BOS]")
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>", "[SEP]")

CHATML = ("<|im_start|>", "<|im_end|>")  # before a turn's role, and after its content

# Explicit, or the library warns on standard error whenever the command starts a process later.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


# What encoders need besides, by the spellings that tokenizers have for them.
SPECIAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


def train_tokenizer(texts: Iterable[str], vocab_size: int, for_encoder: bool = False, marks: Sequence[str] = ()) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens, <|endoftext|> the first; the same texts give the same one.

    `for_encoder` adds BERT's special tokens, and puts [CLS] and [SEP] around what is encoded. `marks` are further
    special tokens, such as CHATML.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *(names[0] for names in SPECIAL.values() if for_encoder), *marks],
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
    """{pad, unk, cls, sep, mask, eos, bos: id}, of those that the tokenizer has.

    What its tokenizer_config.json names goes before the usual spellings. One that names an end of a text but no
    beginning has none: there `<s>` is a token like any other.
    """
    config = tokenizer_config(tokenizer)
    told = _first_known(
        tokenizer, {name: (_content(config.get(f"{name}_token")),) for name in (*SPECIAL, "eos", "bos")}
    )
    begins = {} if "eos" in told else _first_known(tokenizer, {"bos": BEGIN_TOKENS})
    return _spelled(tokenizer) | begins | told


def begin_id(tokenizer: Any) -> int:
    """What a prompt begins with: the tokenizer's beginning of a text, or if it has none the token that ends one."""
    found = special_ids(tokenizer)
    return found.get("bos", found["eos"])


def has_chatml(tokenizer: Any) -> bool:
    """Whether ChatML's marks are tokens of it."""
    return all(tokenizer.token_to_id(mark) is not None for mark in CHATML)


def tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer_config.json beside the file that `find_tokenizer` read, with chat_template.jinja in it."""
    config: dict[str, Any] = getattr(tokenizer, "config", {})
    return config


def _spelled(tokenizer: Any) -> dict[str, int]:
    return _first_known(tokenizer, {**SPECIAL, "eos": END_TOKENS})


def _first_known(tokenizer: Any, spellings: Mapping[str, tuple[str | None, ...]]) -> dict[str, int]:
    found = {}
    for name, tokens in spellings.items():
        ids = [tokenizer.token_to_id(token) for token in tokens if token is not None]
        if known := [number for number in ids if number is not None]:
            found[name] = known[0]
    return found


def _content(token: object) -> str | None:
    """The text of a token as tokenizer_config.json has it: alone, or with how it is to be matched."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


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
    tokenizer = find_tokenizer(path, key)
    found = special_ids(tokenizer)
    if "eos" not in found:
        wanted = f"one of {', '.join(END_TOKENS)} is needed in its vocabulary"
        raise ConfigError(key, path, "this tokenizer has no end-of-text token", wanted)
    return tokenizer, found["eos"]


def find_tokenizer(path: str, key: str = "data.tokenizer.path") -> Any:
    """A tokenizer.json, or the one in a run, a Hugging Face directory or hub model.

    Raises ConfigError if there is none there or it cannot be read.
    """
    from tokenizers import Tokenizer

    file = tokenizer_file(path, key)
    try:
        tokenizer: Any = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(key, path, f"{file.name} is no tokenizer ({str(error).splitlines()[0]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text; see control.text_reader
    tokenizer.config = _config(file.parent)
    return tokenizer


def tokenizer_file(path: str, key: str = "data.tokenizer.path") -> Path:
    """Where `find_tokenizer` reads. Raises ConfigError if there is nothing."""
    given = Path(path).expanduser()
    candidates = (given, given / "tokenizer.json", given / "tokenizer" / "tokenizer.json")
    file = next((file for file in candidates if file.is_file()), None)
    if file is None and given.exists():
        raise ConfigError(key, path, "no tokenizer.json in this directory", "a tokenizer saved by tokenizers is wanted")
    return file or hub.tokenizer_file(path, key)


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


def tokenizer_identity(
    settings: TokenizerConfig, loaded: Any | None, for_encoder: bool, marks: Sequence[str] = ()
) -> dict[str, Any]:
    """What the token ids depend on, for the fingerprint. `marks`: of one that is trained."""
    import tokenizers

    from bigtrain.data.control import leaks

    if loaded is not None:
        spelled = _spelled(loaded)
        told = {name: number for name, number in special_ids(loaded).items() if spelled.get(name) != number}
        identity = {"tokenizer": loaded.to_str(), "library": tokenizers.__version__}
        identity |= {"special_ids": told} if told else {}
        return identity | ({"control_tokens": "read as text"} if leaks(loaded) else {})
    trained = {"vocab_size": settings.vocab_size, "train_mib": settings.train_mib, "library": tokenizers.__version__}
    trained |= {"marks": list(marks)} if marks else {}
    return trained | ({"for_encoder": True} if for_encoder else {})


def _config(directory: Path) -> dict[str, Any]:
    """What a Hugging Face directory says of its tokenizer; nothing where there is no such file, or a broken one."""
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    config = config if isinstance(config, dict) else {}
    with suppress(OSError, ValueError):
        config["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    return config
