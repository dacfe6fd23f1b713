"""A classifier that reads the mean of a text's tokens, as the modules of sentence-transformers: transformers has no
class for one. Encoder, mean, pooler if there is one, and head; what SentenceTransformer.encode gives are the logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bigtrain.checkpoint.weights import read_weights, write_weights
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


def after_mean(name: str) -> bool:
    """Whether the weight of that name is of a layer after the mean."""
    return name.startswith(tuple(LAYERS))


def set_apart(weights: Iterable[tuple[str, Tensor]], apart: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The encoder's of `weights`; those after the mean go into `apart`."""
    for name, tensor in weights:
        if after_mean(name):
            apart[name] = tensor
        else:
            yield name, tensor


def write_modules(directory: Path, config: EncoderConfig, apart: dict[str, Tensor]) -> None:
    """modules.json and what it names, beside the encoder's files in `directory`."""
    modules = ["Transformer", "Pooling"]
    _write(directory / "sentence_bert_config.json", {"max_seq_length": config.max_seq_len, "do_lower_case": False})
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": config.dim} | MEAN)
    for layer, activation in LAYERS.items():
        tensors = {f"linear.{name.removeprefix(layer)}": t for name, t in apart.items() if name.startswith(layer)}
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


def module_paths(directory: Path) -> list[Path]:
    """The folders of the modules after the encoder; none of another Hugging Face directory."""
    file = directory / "modules.json"
    if not file.is_file():
        return []
    return [directory / module["path"] for module in json.loads(file.read_text(encoding="utf-8"))[1:]]


class SentenceClassifier(nn.Module):
    """transformers' encoder and the modules after it in `directory`, behind the calls of a class for texts."""

    def __init__(self, encoder: Any, directory: Path) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        layers: list[nn.Module] = []
        for folder in module_paths(directory)[1:]:  # after the mean
            weights = read_weights(folder)
            outputs, inputs = weights["linear.weight"].shape
            layer = nn.Linear(inputs, outputs, bias="linear.bias" in weights, dtype=weights["linear.weight"].dtype)
            layer.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
            tanh = "Tanh" in json.loads((folder / "config.json").read_text(encoding="utf-8"))["activation_function"]
            layers += [layer, nn.Tanh()] if tanh else [layer]
        self.layers = nn.Sequential(*layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **given: Any) -> Any:
        """(B, T) -> transformers' output with logits (B, labels)."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **given)[0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return SequenceClassifierOutput(logits=self.layers(mean))


def _write(path: Path, data: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
