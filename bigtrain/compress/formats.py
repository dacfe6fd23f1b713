"""A Hugging Face directory's model in the formats that quantized models are served from.

compressed-tensors holds integers as small as they are (int4: eight in 32 bits); transformers and vLLM read it.
torchao's holds int8, for CPUs and GPUs that multiply it. ONNX is onnxruntime's. Whatever is written is loaded again by
what will serve it, and compared (`compress/exported.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.checkpoint.weights import iterate_weights, write_weights
from bigtrain.compress.layers import choose
from bigtrain.compress.quantize import Scheme, check_groups, int8_tensor, integers, scales
from bigtrain.errors import NO_VALUE, ConfigError
from bigtrain.sentence_encoder import SentenceClassifier, module_paths

# What a format takes: names of PTQ, and the widths of a run's own quantization.
NEEDS = {
    "compressed-tensors": ("compressed_tensors",),
    "torchao": ("torchao",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
EXTRAS = {"compressed-tensors": "compressed-tensors", "torchao": "quantization", "onnx": "onnx"}
EXCLUDED = ["*head", "*head.*", "*classifier*", "*qa_outputs", "*score", "cls.*"]  # what follows the last hidden states
ONNX_FILE = "model.onnx"

Grids = dict[str, Tensor]  # {a quantized weight's name there: its scales, (rows, groups)}


def check(format: str, scheme: Scheme | None) -> None:
    """Raises ConfigError for what a format has no room for, or a package that it needs and that is not installed."""
    missing = [name for name in NEEDS[format] if importlib.util.find_spec(name) is None]
    if missing:
        way_out = f"pip install 'bigtrain[{EXTRAS[format]}]'"
        raise ConfigError("--format", format, f"needs {missing[0].replace('_', '-')}", way_out)
    if format == "onnx":
        return
    if scheme is None:
        problem = "is for quantized models, and RUN was trained without"
        raise ConfigError("--quantize", NO_VALUE, problem, "give int8_dynamic, int8 or int4")
    if format == "torchao" and scheme.bits != 8:
        problem = f"keeps int{scheme.bits} in 8 bits, so that nothing gets smaller"
        raise ConfigError("--format", format, problem, "take compressed-tensors")


def grids(settings: dict[str, Any], weights: Iterable[tuple[str, Tensor]], scheme: Scheme) -> Grids:
    """Of a model that was not trained quantized: scales of all its linear layers but what follows the last of them.

    settings: its config.json; weights: by their names there. Raises ConfigError where groups do not divide a layer.
    """
    chosen = {layer.weight: layer for layer in choose(empty(settings), ["*"], EXCLUDED, "--quantize")}
    _refuse_conv1d(layer.module for layer in chosen.values() if layer.transposed)
    found: Grids = {}
    for name, weight in weights:
        if name in chosen:
            check_groups(chosen[name].module, weight.shape[1], scheme, "--quantize")
            found[name] = scales(weight, scheme)
    return found


def trained_grids(settings: dict[str, Any], expanded: Iterable[tuple[str, Tensor]], scheme: Scheme) -> Grids:
    """Of a model that was: `expanded` has each weight's scales in its place and shape, 0 where there is none."""
    found = {
        name: tensor[:, :: scheme.group_size or tensor.shape[1]].contiguous()
        for name, tensor in expanded
        if tensor.dim() == 2 and tensor.any()
    }
    modules = dict(empty(settings).named_modules())
    _refuse_conv1d(
        name
        for name in (weight.removesuffix(".weight") for weight in found)
        if not isinstance(modules[name], nn.Linear)
    )
    return found


def _refuse_conv1d(names: Iterable[str]) -> None:
    if name := next(iter(names), None):
        problem = f"{name} is transformers' Conv1D, whose weights lie transposed: no format of quantized layers has it"
        way_out = "a run with quantization keeps it in --format huggingface or onnx; model=llama_* has linear layers"
        raise ConfigError("--format", NO_VALUE, problem, way_out)


def empty(settings: dict[str, Any]) -> Any:
    """transformers' model of a config.json, on the meta device."""
    import transformers

    kind = getattr(transformers, settings["architectures"][0])
    values = {name: value for name, value in settings.items() if name != "quantization_config"}
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(values))
    model.tie_weights()
    return model


def load(directory: Path) -> Any:
    """The model in a Hugging Face directory, of the class that its config.json names, or a sentence encoder's."""
    import transformers

    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, settings["architectures"][0])
    model = kind.from_pretrained(directory, local_files_only=True)
    return (SentenceClassifier(model, directory) if module_paths(directory) else model).eval()


# --------------------------------------------------------------------------------------------------- writing


def write(format: str, plain: Path, out: Path, scheme: Scheme | None, scale_of: Grids) -> None:
    """What is in `plain`, a Hugging Face directory, into `out`, which exists, in another format."""
    settings = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    for path in plain.iterdir():
        if path.is_file() and not path.name.startswith("model") and path.name != "config.json":
            shutil.copy(path, out / path.name)
    if format == "onnx":
        (out / "modules.json").unlink(missing_ok=True)  # of a sentence encoder they are all in the graph
        (out / "sentence_bert_config.json").unlink(missing_ok=True)
    else:
        for folder in module_paths(plain):
            shutil.copytree(folder, out / folder.name)
    if format == "onnx":
        _write_onnx(plain, out, scheme)
    else:
        assert scheme is not None
        written = _write_compressed if format == "compressed-tensors" else _write_torchao
        settings["quantization_config"] = written(settings, plain, out, scheme, scale_of)
        if format == "compressed-tensors" and module_paths(plain):
            # sentence-transformers calls the encoder's forward alone, past the hook that unpacks at the first call.
            settings["quantization_config"]["dequantize"] = True
    (out / "config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain_layers(settings: dict[str, Any], scale_of: Grids) -> list[str]:
    """Linear layers that stay as they are."""
    linear = [name for name, module in empty(settings).named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if f"{name}.weight" not in scale_of]


def _write_compressed(settings: dict[str, Any], plain: Path, out: Path, scheme: Scheme, scale_of: Grids) -> Any:
    """github.com/vllm-project/compressed-tensors: int-quantized with int8 inputs, otherwise pack-quantized."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, weight in iterate_weights(plain):
            scale = scale_of.get(name)
            if scale is None:
                yield name, weight
                continue
            whole = integers(weight, scale, scheme)
            if scheme.activations:
                yield name, whole
            else:
                yield f"{name}_packed", pack_to_int32(whole, scheme.bits)
                yield f"{name}_shape", torch.tensor(weight.shape)
            yield f"{name}_scale", scale.to(weight.dtype)

    write_weights(out, tensors())
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= (
        {"strategy": "channel"} if scheme.group_size is None else {"strategy": "group", "group_size": scheme.group_size}
    )
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if scheme.activations else None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme.activations else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"output_activations": None}},
        "ignore": _plain_layers(settings, scale_of),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _write_torchao(settings: dict[str, Any], plain: Path, out: Path, scheme: Scheme, scale_of: Grids) -> Any:
    """As transformers' `save_pretrained` writes a model that torchao has quantized."""
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    held = {
        name: int8_tensor(weight, scale_of[name], scheme) if name in scale_of else weight
        for name, weight in iterate_weights(plain)
    }
    flat, metadata = flatten_tensor_state_dict(held)
    save_file(
        {name: tensor.contiguous() for name, tensor in flat.items()},
        out / "model.safetensors",
        metadata | {"format": "pt"},
    )
    kind: Any = Int8DynamicActivationInt8WeightConfig() if scheme.activations else Int8WeightOnlyConfig(version=2)
    return TorchAoConfig(kind, modules_to_not_convert=_plain_layers(settings, scale_of)).to_dict()


class _Logits(nn.Module):
    """transformers' model with its inputs by position, for a graph: what comes first of its outputs."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Any:
        output = self.model(**dict(zip(self.names, tensors, strict=True)))
        return (output.start_logits, output.end_logits) if "start_logits" in output else output[0]


def input_names(model: Any) -> list[str]:
    """Of the model's graph."""
    types = getattr(model.config, "type_vocab_size", 0) or 0
    return ["input_ids", "attention_mask", *(["token_type_ids"] if types > 1 else [])]


def _write_onnx(plain: Path, out: Path, scheme: Scheme | None) -> None:
    """Batch and length are free. With int8 inputs, onnxruntime's own dynamic quantization, row by row."""
    model = load(plain).float()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    names = input_names(model)
    length = min(16, getattr(model.config, "max_position_embeddings", 16))
    ids = torch.zeros(2, length, dtype=torch.int64)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    outputs = ["start_logits", "end_logits"] if "QuestionAnswering" in type(model).__name__ else ["logits"]
    with torch.no_grad():
        torch.onnx.export(
            _Logits(model, names), tuple(given[name] for name in names), out / ONNX_FILE, dynamo=True,
            input_names=names, output_names=outputs, external_data=False, verbose=False,
            dynamic_shapes=(tuple({0: batch, 1: sequence} for _ in names),),
        )  # fmt: skip
    if scheme is not None and scheme.activations:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole = (out / ONNX_FILE).rename(out / "whole.onnx")
        # Unsigned, as activations are: where a CPU has no VNNI, onnxruntime adds products of signed weights in 16 bits,
        # which saturate: a fifth of the largest logit was lost on a CPU with AVX2 alone, unsigned a thirtieth.
        quantize_dynamic(whole, out / ONNX_FILE, per_channel=True, weight_type=QuantType.QUInt8)
        whole.unlink()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Progress bars and notes of the libraries are not a command's output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        said = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
