"""`model=pretrained` and `model=hf`: architecture, weights and tokenizer of a run, a Hugging Face directory or a hub
model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigtrain import config as schema
from bigtrain.config import (
    ClassificationConfig,
    Config,
    DecoderConfig,
    EncoderConfig,
    HuggingFaceConfig,
    PretrainedConfig,
    Seq2SeqConfig,
)
from bigtrain.data import hub
from bigtrain.errors import ConfigError

POOLING = "1_Pooling/config.json"  # where sentence-transformers says how


def resolved(data: dict[str, Any]) -> dict[str, Any]:
    """A composed config with `model=pretrained` or `model=hf` completed by the model that is there; any other as it is.

    Raises ConfigError if there is none, or longer sequences are asked for than its positions allow, or what only an
    encoder can do.
    """
    model = data.get("model")
    if isinstance(model, dict) and model.get("kind") == "hf":
        return _completed(data, schema.section(HuggingFaceConfig, model, "model"))
    if not isinstance(model, dict) or model.get("kind") != "pretrained":
        return data
    asked = schema.section(PretrainedConfig, model, "model")
    if not asked.path:
        raise ConfigError("model.path", asked.path, "missing", "name a run or a Hugging Face directory")
    path = _directory(asked.path)
    found = _architecture(path)
    if isinstance(found, HuggingFaceConfig):
        if asked.dropout is not None:
            raise ConfigError("model.dropout", asked.dropout, "transformers' models have several", "leave it null")
        if asked.n_layers is not None:
            raise ConfigError("model.n_layers", asked.n_layers, f"{path} is transformers' own code", "leave it null")
        return _starting(_shortened(data, found, asked.max_seq_len or 0), path)
    learned = getattr(found, "positions", "") == "learned"
    if asked.max_seq_len is not None:
        if learned and asked.max_seq_len > found.max_seq_len:
            raise ConfigError("model.max_seq_len", asked.max_seq_len, f"{path} has {found.max_seq_len} positions")
        if not learned:
            found.max_seq_len = asked.max_seq_len
    if asked.dropout is not None:
        found.dropout = asked.dropout
    if asked.n_layers is not None:
        if isinstance(found, Seq2SeqConfig) or asked.n_layers > found.n_layers:
            problem = f"{path} has {found.n_layers}" + (" and a decoder's" if isinstance(found, Seq2SeqConfig) else "")
            raise ConfigError("model.n_layers", asked.n_layers, problem)
        found.n_layers = asked.n_layers
    for name in ("unpadded", "pooling"):
        value = getattr(asked, name)
        if value is None:
            continue
        if not isinstance(found, EncoderConfig):
            raise ConfigError(f"model.{name}", value, f"for encoders only; {path} has a {found.kind}")
        setattr(found, name, value)
    if asked.rope_scaling is not None:
        if not isinstance(found, DecoderConfig):
            problem = f"for decoders only; {path} has a {found.kind}"
            raise ConfigError("model.rope_scaling", asked.rope_scaling.kind, problem)
        found.rope_scaling = asked.rope_scaling
    if isinstance(found, EncoderConfig) and asked.pooling == "mean":
        found.pooler = False
    changed: dict[str, Any] = {"model": schema.to_dict(found)}
    task = data.get("task")
    if learned and isinstance(task, dict) and task.get("max_length", 0) is None:
        # The table of positions stays as long as it was learned; the examples are what is shorter.
        changed["task"] = task | {"max_length": asked.max_seq_len}
    return _starting(data | changed, path)


def pooling_advice(config: Config) -> str | None:
    """A line for who classifies by the first token with an encoder that sentence-transformers trained by the mean."""
    model, task = config.model, config.task
    if config.init_from is None or not isinstance(task, ClassificationConfig):
        return None
    if not isinstance(model, EncoderConfig) or model.pooling != "first":
        return None
    told = Path(config.init_from) / POOLING
    try:
        by_mean = json.loads(told.read_text(encoding="utf-8"))["pooling_mode_mean_tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    said = f"{told}: this encoder was trained by the mean of a text's tokens; model.pooling=mean reads it"
    return said if by_mean else None


def check_weights(config: Config) -> str | None:
    """Compare the weights of `init_from` with the model, and its tokens with those of the prepared data, before any
    rank starts: names and shapes, no bytes. A line about tokens that have been renamed, or None.

    Raises BigtrainError for weights that do not fit, ConfigError for other tokens.
    """
    import torch

    from bigtrain import tasks
    from bigtrain.checkpoint import transfer

    assert config.init_from is not None
    task = tasks.build(config)
    with torch.device("meta"):
        model = task.build_model(config.model)
    transfer.load_initial(model, config.init_from)
    return _check_tokens(config.init_from, str(task.tokenizer_file))


MOST_RENAMED = 0.02  # of the tokens: reserved ones get new names


def _check_tokens(source: str, tokenizer_file: str) -> str | None:
    """Rows of an embedding mean what the tokenizer that it was trained with says. Tokens beyond those are new ones."""
    from bigtrain.data.tokenizer import find_tokenizer

    path = Path(source)
    places = (path, path / "tokenizer", path.parent.parent / "tokenizer")  # a directory, a run, one of its checkpoints
    found = next((place for place in places if (place / "tokenizer.json").is_file()), None)
    if found is None:
        return None
    theirs = find_tokenizer(str(found), "init_from").get_vocab(with_added_tokens=True)
    mine = find_tokenizer(tokenizer_file).get_vocab(with_added_tokens=True)
    known = {number: token for token, number in theirs.items()}
    other = [(number, token) for token, number in mine.items() if known.get(number, token) != token]
    if not other:
        return None
    number, token = min(other)
    first = f"{number} is {known[number]!r} there and {token!r} in the data"
    if len(other) > MOST_RENAMED * len(mine):
        raise ConfigError(
            "init_from", source, f"its weights are of other tokens: {first}, and {len(other)} of {len(mine)} differ",
            f"take data.tokenizer.path={found}",
        )  # fmt: skip
    return f"{len(other)} tokens have other names than in {found}: {first}"


def with_teacher(config: Config) -> Config:
    """A distillation's teacher as the directory that it is, whose tokenizer the student takes if no other is named."""
    distil = config.compress.distil
    if distil is None or not distil.teacher:
        return config  # `checks` says what is missing
    path = str(_directory(distil.teacher))
    tokenizer = config.data.tokenizer
    if tokenizer.path is None:
        tokenizer = replace(tokenizer, path=path)
    return replace(
        config,
        compress=replace(config.compress, distil=replace(distil, teacher=path)),
        data=replace(config.data, tokenizer=tokenizer),
    )


def _completed(data: dict[str, Any], asked: HuggingFaceConfig) -> dict[str, Any]:
    """With what transformers has for the directory or hub model that `model=hf` names."""
    if not asked.path:
        raise ConfigError("model.path", asked.path, "missing", "name a Hugging Face directory or hub model")
    from bigtrain.models.huggingface import auto

    task, path = data.get("task"), _directory(asked.path, weights=asked.pretrained)
    kind = task.get("kind", "causal_lm") if isinstance(task, dict) else "causal_lm"
    if kind not in auto.CLASSES:
        return data  # the schema says which tasks there are
    found = auto.read_config(path, kind, asked.pretrained)
    return _starting(_shortened(data, found, asked.max_seq_len), path, weights=asked.pretrained)


def _shortened(data: dict[str, Any], found: HuggingFaceConfig, length: int) -> dict[str, Any]:
    if length > found.max_seq_len:
        raise ConfigError("model.max_seq_len", length, f"{found.path} takes {found.max_seq_len} tokens")
    return data | {"model": schema.to_dict(found) | {"max_seq_len": length or found.max_seq_len}}


def _starting(data: dict[str, Any], path: Path, weights: bool = True) -> dict[str, Any]:
    """With the weights and the tokenizer from there too, where others are not asked for."""
    changed: dict[str, Any] = {}
    if weights and data.get("init_from") is None:
        changed["init_from"] = str(path)
    settings = data.get("data")
    if isinstance(settings, dict) and isinstance(settings.get("tokenizer"), dict):
        tokenizer = settings["tokenizer"]
        if tokenizer.get("path") is None:
            changed["data"] = settings | {"tokenizer": tokenizer | {"path": str(path)}}
    return data | changed


def _directory(path: str, weights: bool = True) -> Path:
    """A directory as it is named, or where the hub's model of that name has been fetched to."""
    given = Path(os.path.abspath(os.path.expanduser(path)))
    if given.exists() or not hub.looks_like_name(path):
        return given
    return hub.model_directory(path, "model.path", weights)


def _architecture(path: Path) -> schema.ModelConfig:
    if (path / "config.yaml").is_file():
        return schema.load(path / "config.yaml").model
    from bigtrain.models import huggingface

    return huggingface.read_config(path, "model.path")
