"""`model=pretrained`: the architecture, weights and tokenizer of a run or a Hugging Face directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bigtrain import config as schema
from bigtrain.config import EncoderConfig, PretrainedConfig, Seq2SeqConfig
from bigtrain.errors import ConfigError


def resolved(data: dict[str, Any]) -> dict[str, Any]:
    """A composed config with `model=pretrained` replaced by the model that is there; any other as it is.

    Raises ConfigError if there is none, or longer sequences are asked for than its positions allow, or what only an
    encoder can do.
    """
    model = data.get("model")
    if not isinstance(model, dict) or model.get("kind") != "pretrained":
        return data
    asked = schema.section(PretrainedConfig, model, "model")
    if not asked.path:
        raise ConfigError("model.path", asked.path, "missing", "name a run or a Hugging Face directory")
    path = Path(os.path.abspath(os.path.expanduser(asked.path)))
    found = _architecture(path)
    learned = not isinstance(found, Seq2SeqConfig) and found.positions == "learned"
    if asked.max_seq_len is not None:
        if learned and asked.max_seq_len > found.max_seq_len:
            raise ConfigError("model.max_seq_len", asked.max_seq_len, f"{path} has {found.max_seq_len} positions")
        if not learned:
            found.max_seq_len = asked.max_seq_len
    if asked.dropout is not None:
        found.dropout = asked.dropout
    if asked.unpadded is not None:
        if not isinstance(found, EncoderConfig):
            raise ConfigError("model.unpadded", asked.unpadded, f"for encoders only; {path} has a {found.kind}")
        found.unpadded = asked.unpadded
    changed: dict[str, Any] = {"model": schema.to_dict(found)}
    if data.get("init_from") is None:
        changed["init_from"] = str(path)
    settings = data.get("data")
    if isinstance(settings, dict) and isinstance(settings.get("tokenizer"), dict):
        tokenizer = settings["tokenizer"]
        if tokenizer.get("path") is None:
            changed["data"] = settings | {"tokenizer": tokenizer | {"path": str(path)}}
    task = data.get("task")
    if learned and isinstance(task, dict) and task.get("max_length", 0) is None:
        # The table of positions stays as long as it was learned; the examples are what is shorter.
        changed["task"] = task | {"max_length": asked.max_seq_len}
    return data | changed


def _architecture(path: Path) -> schema.ModelConfig:
    if (path / "config.yaml").is_file():
        return schema.load(path / "config.yaml").model
    from bigtrain.models import huggingface

    return huggingface.read_config(path)
