"""A classifier that reads the mean of a text's tokens, as the modules of sentence-transformers: transformers has no
class for one. Encoder, mean, pooler if there is one, and head; what SentenceTransformer.encode gives are the logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from bigtrain.checkpoint.weights import write_weights
from bigtrain.config import ClassificationConfig, Config, EncoderConfig
from bigtrain.models.huggingface.names import BACKBONE, HEAD

# A layer of ours after the mean, and the activation that follows it.
LAYERS = {
    BACKBONE + "pooler.": "torch.nn.modules.activation.Tanh",
    HEAD + "linear.": "torch.nn.modules.linear.Identity",
}
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def is_one(config: Config) -> bool:
    """Whether the run's model is such a classifier."""
    model = config.model
    return (
        isinstance(config.task, ClassificationConfig) and isinstance(model, EncoderConfig) and model.pooling == "mean"
    )


def set_apart(weights: Iterable[tuple[str, Tensor]], after_mean: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The encoder's of `weights`; those of LAYERS go into `after_mean`."""
    for name, tensor in weights:
        if name.startswith(tuple(LAYERS)):
            after_mean[name] = tensor
        else:
            yield name, tensor


def write_modules(directory: Path, config: EncoderConfig, after_mean: dict[str, Tensor]) -> None:
    """modules.json and what it names, beside the encoder's files in `directory`."""
    modules = ["Transformer", "Pooling"]
    _write(directory / "sentence_bert_config.json", {"max_seq_length": config.max_seq_len, "do_lower_case": False})
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": config.dim} | MEAN)
    for layer, activation in LAYERS.items():
        tensors = {f"linear.{name.removeprefix(layer)}": t for name, t in after_mean.items() if name.startswith(layer)}
        if not tensors:
            continue
        outputs, inputs = tensors["linear.weight"].shape
        settings = {"in_features": inputs, "out_features": outputs, "bias": "linear.bias" in tensors}
        folder = directory / f"{len(modules)}_Dense"
        _write(folder / "config.json", settings | {"activation_function": activation})
        write_weights(folder, tensors.items())
        modules.append("Dense")
    paths = ["", *(f"{index}_{name}" for index, name in enumerate(modules[1:], 1))]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(modules, paths, strict=True))
    ]
    _write(directory / "modules.json", listed)


def _write(path: Path, data: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
