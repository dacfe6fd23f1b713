"""What became of a model by exporting it: loaded again by what will serve it, and measured beside the original."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import tasks
from bigtrain.compress import formats
from bigtrain.compress.formats import Grids
from bigtrain.compress.quantize import QuantizedLinear, Scheme
from bigtrain.config import Config, HuggingFaceConfig, MaskedLMConfig
from bigtrain.data.example_loader import Share
from bigtrain.errors import BigtrainError
from bigtrain.sentence_encoder import SentenceClassifier

BATCHES, BATCH = 8, 8  # of held-out data: enough to see a loss change, soon done


class Onnx(nn.Module):
    """A graph behind the calls of transformers' model."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(directory / formats.ONNX_FILE, providers=["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]
        self.outputs = [found.name for found in self.session.get_outputs()]

    def forward(self, **inputs: Any) -> Any:
        ids = inputs["input_ids"]
        blank = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        given = blank | {name: tensor for name, tensor in inputs.items() if tensor is not None}
        found = self.session.run(None, {name: given[name].long().numpy() for name in self.names})
        return _Outputs(zip(self.outputs, map(torch.from_numpy, found), strict=True))


class _Outputs(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        return next(iter(self.values())) if key == 0 else super().__getitem__(key)


@torch.no_grad()
def measure(
    config: Config, format: str, plain: Path, written: Path, settings: dict[str, Any], scheme: Scheme | None,
    scale_of: Grids,
) -> dict[str, Any]:  # fmt: skip
    """plain: the model as a Hugging Face directory, not quantized (ONNX: as it is in the graph); scale_of: how it is
    quantized in `written`.

    logits_largest, logits_difference (the largest, from the same arithmetic in PyTorch, or where `scale_of` is empty
    from `plain`), bytes and bytes_plain on disk; where the run's data are here also loss and loss_plain.
    """
    original, exported = formats.load(plain), Onnx(written) if format == "onnx" else formats.load(written)
    loss = _Loss(config, settings, plain)
    found: dict[str, Any] = {"bytes": _bytes(written), "bytes_plain": _bytes(plain)}
    if loss.batches:
        found |= {"loss_plain": loss.of(original), "loss": loss.of(exported)}
    encoder = original.encoder if isinstance(original, SentenceClassifier) else original
    for name, scale in scale_of.items():
        layer: Any = encoder.get_submodule(name.removesuffix(".weight"))
        layer.__class__ = QuantizedLinear
        layer.scheme, layer.scale, layer.enabled = scheme, scale, True
    expected, seen = (_logits(model, original.config.vocab_size) for model in (original, exported))
    return found | {
        "logits_largest": float(expected.abs().max()),
        "logits_difference": float((expected - seen).abs().max()),
    }


def _logits(model: Any, vocab_size: int) -> Tensor:
    """Of the same random tokens."""
    tokens = torch.randint(vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    found: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0]
    return found.float()


class _Loss:
    """The task's loss on some held-out batches, if the run's data are here."""

    def __init__(self, config: Config, settings: dict[str, Any], plain: Path) -> None:
        self.batches: list[Any] = []
        pairs = isinstance(config.task, MaskedLMConfig) and config.task.sentence != "none"
        if pairs:  # two losses, of which transformers' model for masked words has one
            return
        architecture = {name: value for name, value in settings.items() if name != "quantization_config"}
        theirs = HuggingFaceConfig(
            path=str(plain), max_seq_len=config.model.max_seq_len, architecture=architecture,
            vocab_size=settings.get("vocab_size"), pretrained=False,
        )  # fmt: skip
        try:
            self.task = tasks.build(replace(config, model=theirs))
            held_out = self.task.held_out(Share(0, 1, BATCH, BATCH, config.train.seed), BATCHES)
            with torch.device("meta"):
                self.adapter: Any = self.task.build_model(theirs).eval()
            self.batches = list(itertools.islice(held_out, BATCHES))
        except (BigtrainError, OSError):
            return

    def of(self, model: Any) -> float:
        """Per target."""
        self.adapter.model = model
        nll = sum(float(self.task.evaluate(self.adapter, batch).nll) for batch in self.batches)
        return nll / sum(self.task.count_targets(batch) for batch in self.batches)


def _bytes(directory: Path) -> int:
    """Of the weights."""
    return sum(
        path.stat().st_size for path in directory.rglob("*") if path.suffix in (".safetensors", ".onnx", ".data")
    )


def table(found: dict[str, Any], format: str) -> list[str]:
    """For people."""
    lines = [
        f"        {format:20s}as a plain directory",
        f"size    {found['bytes'] / 1e6:.2f} MB".ljust(28) + f"{found['bytes_plain'] / 1e6:.2f} MB",
    ]
    if "loss" in found:
        lines.append(f"loss    {found['loss']:.4f}".ljust(28) + f"{found['loss_plain']:.4f}, on held-out data")
    else:
        lines.append("loss    not measured: the data that RUN was trained on are not here")
    largest = f"{found['logits_difference']:.2g} at most, of {found['logits_largest']:.3g}"
    lines.append(f"logits  loaded again they differ by {largest}, from {found['compared_with']}")
    return lines
