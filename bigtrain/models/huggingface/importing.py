"""Weights of a Hugging Face directory under our names and in our layout, one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bigtrain.config import EncoderConfig, OurModelConfig, Seq2SeqConfig
from bigtrain.encryption import is_encrypted
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.models.huggingface import seq2seq
from bigtrain.models.huggingface.names import BACKBONE, Family, family_of
from bigtrain.models.stored import INDEX, SINGLE, StoredTensors

# Of older files; they hold nothing learned.
BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|position_ids$|token_type_ids$")
_IN_A_LAYER = re.compile(r"\.\d+\.")


def iterate_weights(
    directory: Path, config: OurModelConfig, prefix: str | None = None, read: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(our parameter name, tensor) of a directory for which `read_config` gave `config`; one tensor is held at a time.

    prefix: of the names of the model itself, by default "backbone." for an encoder, "" for a decoder. An encoder's
    heads come as "head." and "pair_head.", those that the files hold: for masked words, pairs, or `classifier`. What
    else the files hold comes last, empty, under their own names: to be named among what is left out.
    Without `read` the tensors are on the meta device: names and shapes, and no bytes.
    Raises BigtrainError for a weight that is missing, is quantized, or is in a layer that our model has no place for;
    ConfigError where there are pickled weights only.
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
            parts.append(stored.weight(place, read))
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
    used |= {place for copy in family.copies if (place := _locate(copy, names, family)) is not None}
    if isinstance(config, Seq2SeqConfig):
        used |= {place for copy in seq2seq.CONSTANTS if (place := _locate(copy, names, family)) is not None}
    for name in sorted(names - used):
        if BUFFERS.search(name):
            continue
        if _IN_A_LAYER.search(name):
            raise BigtrainError(f"{directory}: holds {name}, which no {family.model_type} of its config.json has")
        yield name, torch.empty(0, device="meta")


def check_copies(stored: StoredTensors, config: OurModelConfig, key: str) -> None:
    """Raises ConfigError for a second copy of a tensor that is another than the first, which alone is read."""
    family = family_of(config)
    names = set(stored.names)
    read = {name for rule in family.rules(config) for name in rule.theirs}
    for copy, original in family.copies.items():
        if copy in read:
            continue  # an untied head, a parameter of its own
        one, other = _locate(copy, names, family), _locate(original, names, family)
        if one and other and one != other and not stored.equal(one, other):
            raise ConfigError(key, str(stored.directory), *another_copy(one, other))


def another_copy(one: str, other: str) -> tuple[str, str]:
    """(problem, way out) of two tensors that ought to be one."""
    return (
        f"its {one} is another than its {other}, though they are one by its config.json",
        'write "tie_word_embeddings": false there if the model has both, or remove the one that it has not',
    )


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
