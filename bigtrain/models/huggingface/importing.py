"""Weights of a Hugging Face directory under our names and in our layout, one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bigtrain.config import EncoderConfig, OurModelConfig
from bigtrain.encryption import is_encrypted
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.models.huggingface.names import BACKBONE, Family, family_of
from bigtrain.models.stored import INDEX, SINGLE, StoredTensors

_BUFFERS = re.compile(r"attn\.(masked_)?bias$|rotary_emb\.inv_freq$")  # of older files; they hold nothing learned
_IN_A_LAYER = re.compile(r"\.\d+\.")


def iterate_weights(
    directory: Path, config: OurModelConfig, prefix: str | None = None, read: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(our parameter name, tensor) of a directory for which `read_config` gave `config`; one tensor is held at a time.

    prefix: of the names of the model itself, by default "backbone." for an encoder, "" for a decoder. An encoder's
    heads come as "head." and "pair_head.", those that the files hold: for masked words, pairs, or `classifier`.
    Without `read` the tensors are on the meta device: names and shapes, and no bytes.
    Raises BigtrainError for a weight that is missing, or one in a layer that our model has no place for; ConfigError
    where there are pickled weights only.
    """
    stored, family = open_weights(directory), family_of(config)
    names = set(stored.names)
    used: set[str] = set()
    for rule in family.rules(config):
        places = [_locate(name, names, family) for name in rule.theirs]
        if rule.optional and isinstance(config, EncoderConfig) and None in places:
            continue  # an encoder comes with any heads or none
        parts = []
        for place, name in zip(places, rule.theirs, strict=True):
            if place is None:
                raise BigtrainError(f"{directory}: has no weight {name}, which its config.json asks for")
            parts.append(stored.tensor(place, read))
            used.add(place)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        ours = rule.ours
        if ours == BACKBONE + "positions.weight":
            whole = whole[-config.max_seq_len :]  # RoBERTa's begin after padding's
        if prefix is not None and ours.startswith(BACKBONE):
            ours = prefix + ours.removeprefix(BACKBONE)
        elif prefix is not None and not isinstance(config, EncoderConfig):
            ours = prefix + ours
        yield ours, whole.t() if rule.transposed else whole
    for name in sorted(names - used):
        if _IN_A_LAYER.search(name) and not _BUFFERS.search(name):
            raise BigtrainError(f"{directory}: holds {name}, which no {family.model_type} of its config.json has")


def open_weights(directory: Path, key: str = "init_from") -> StoredTensors:
    """Raises ConfigError for pickled weights, BigtrainError where there are none or they cannot be read."""
    safe = (directory / SINGLE).is_file() or (directory / INDEX).is_file() or is_encrypted(directory)
    if not safe and (pickled := sorted(path.name for path in directory.glob("*.bin"))):
        raise ConfigError(
            key, str(directory), f"only pickled weights there ({pickled[0]}), which can run code when they are read",
            f'convert them: python -c "import transformers;'
            f" transformers.{_architecture(directory)}.from_pretrained('{directory}').save_pretrained('{directory}')\"",
        )  # fmt: skip
    return StoredTensors(directory)


def _architecture(directory: Path) -> str:
    """The class that config.json names, or a general one."""
    try:
        name = json.loads((directory / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        return "AutoModel"
    return name if isinstance(name, str) and name.isidentifier() else "AutoModel"


def _locate(name: str, names: Collection[str], family: Family) -> str | None:
    """`name` as these files have it: with or without the base model's prefix, or by an older name."""
    older = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    candidates = [name, family.prefix + name, older, family.prefix + older]
    if name in ("cls.predictions.bias", "lm_head.bias"):
        candidates.append(name.replace("bias", "decoder.bias"))  # the same tensor twice: files may keep either
    return next((candidate for candidate in candidates if candidate in names), None)
