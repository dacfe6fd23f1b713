"""Quantized models written, loaded by what will serve them, and compared; and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigtrain import cli, generate
from bigtrain.checkpoint import newest
from bigtrain.checkpoint.integrity import seal
from bigtrain.compress import calibrated, exported, formats
from bigtrain.compress.quantize import PTQ, Quantize, as_trained, rounded, trained
from bigtrain.compress_config import QuantizeConfig
from bigtrain.config import ClassificationConfig, Config, dump, load
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.export import export, export_quantized
from tests.test_export import BERT, GPT, LLAMA, WithHeads, decoder_run, make_run

pytest.importorskip("torchao")
pytest.importorskip("compressed_tensors")
INT4 = QuantizeConfig(bits=4, group_size=16, start=5)


def quantized_run(run: Path, model: Any, settings: QuantizeConfig, frozen: bool = False) -> tuple[Path, Any]:
    """A run directory as quantization-aware training leaves it, and its model as it computes."""
    made, decoder = decoder_run(run, model)
    config = load(made / "config.yaml")
    config.compress.quantize = settings
    (made / "config.yaml").write_text(dump(config))
    transform = Quantize(settings)
    transform.apply(decoder)
    if frozen:  # not what the weights would give now
        transform._hold({name: torch.full((len(layer.weight), layer.in_features // 16), 0.125)
                         for name, layer in transform.layers.items()})  # fmt: skip
    checkpoint = made / "checkpoints" / "step-00000010"
    (checkpoint / "compress").mkdir()
    save_file(transform.state(), checkpoint / "compress" / "quantize.safetensors")
    seal(checkpoint, {"step": 10})
    transform.enable(10)
    return made, decoder


def tokens() -> Tensor:
    return torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True], ids=["following", "frozen"])
def test_what_a_run_trained_is_what_every_command_uses(frozen: bool, tmp_path: Path) -> None:
    run, ours = quantized_run(tmp_path / "run", LLAMA, INT4, frozen)
    expected = ours(tokens())
    config, checkpoint = load(run / "config.yaml"), newest(run)
    assert checkpoint is not None
    again = as_trained(generate.build(config.model, "causal_lm"), config, checkpoint)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(tokens()), expected)
    generate.run(run, ["def"], max_new_tokens=2)

    dense = export(run, tmp_path / "dense")
    assert not [name for name in load_file(dense / "model.safetensors") if "quant" in name or "scale" in name]
    same = transformers.AutoModelForCausalLM.from_pretrained(dense)(tokens()).logits
    torch.testing.assert_close(same, expected, rtol=1e-5, atol=1e-5)

    out, measured = export_quantized(run, tmp_path / "packed", "compressed-tensors", None)
    assert measured["logits_difference"] == 0
    assert measured["compared_with"] == "the same in PyTorch"
    with formats.quietly():
        packed = formats.load(out)
        torch.testing.assert_close(packed(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    stored = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert stored[f"{name}_packed"].shape == (32, 32 // 8)
    assert stored[f"{name}_scale"].shape == (32, 2)
    assert name not in stored
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]

    settings = replace(INT4, start=11)  # a checkpoint from before it began
    config.compress.quantize = settings
    assert trained(config, checkpoint) is None
    (checkpoint / "compress" / "quantize.safetensors").unlink()
    config.compress.quantize = INT4
    with pytest.raises(BigtrainError, match=r"holds no state of compress\.quantize"):
        trained(config, checkpoint)


@torch.no_grad()
def test_pruned_weights_are_still_zero_in_the_file(tmp_path: Path) -> None:
    run, ours = decoder_run(tmp_path / "run", LLAMA)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 2:
                parameter.view(-1)[::2] = 0
    again = make_run(tmp_path / "sparse", Config(model=LLAMA), ours)
    out, _ = export_quantized(again, tmp_path / "out", "compressed-tensors", "int4")
    with formats.quietly():
        packed = formats.load(out)
        packed(tokens())
    weight = packed.model.layers[0].mlp.down_proj.weight
    assert not weight.view(-1)[::2].any()
    assert torch.equal(weight, rounded(ours.blocks[0].feed_forward.down.weight, None, PTQ["int4"]))
    assert run.is_dir()


@torch.no_grad()
@pytest.mark.parametrize(
    ("format", "quantize", "most"),
    [("compressed-tensors", "int8_dynamic", 0.05), ("compressed-tensors", "int8", 0), ("torchao", "int8_dynamic", 0)],
)
def test_post_training(format: str, quantize: str, most: float, tmp_path: Path) -> None:
    run, _ = decoder_run(tmp_path / "run", LLAMA)
    out, measured = export_quantized(run, tmp_path / "out", format, quantize)
    assert measured["logits_difference"] <= most * measured["logits_largest"]
    assert measured["bytes"] < 0.8 * measured["bytes_plain"]
    assert "loss" not in measured  # there are no data
    assert "not measured" in exported.table(measured, format)[2]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == format
    assert (out / "tokenizer.json").is_file()


@torch.no_grad()
def test_a_classifier_as_a_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = WithHeads("classification").eval()
    run = make_run(tmp_path / "run", Config(model=BERT, task=ClassificationConfig()), model)
    (run / "labels.json").write_text('["O", "PER", "LOC"]')
    out, measured = export_quantized(run, tmp_path / "whole", "onnx", None)
    assert measured["logits_difference"] < 1e-4
    ids = torch.randint(5, 300, (3, 7))  # neither the batch nor the length that it was traced with
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    found = exported.Onnx(out)(input_ids=ids, attention_mask=mask).logits
    hidden = model.backbone(ids, mask, torch.zeros_like(ids))
    torch.testing.assert_close(found, model.head(model.backbone.pool(hidden)), rtol=1e-4, atol=1e-4)
    printed = io.StringIO()  # what the model card says to do
    use = (out / "README.md").read_text().split("```python\n")[1].split("```")[0].replace('"whole"', repr(str(out)))
    with contextlib.redirect_stdout(printed):
        exec(use, {})
    assert "float32" in printed.getvalue()
    small, rough = export_quantized(run, tmp_path / "int8", "onnx", "int8_dynamic")
    assert 1e-4 < rough["logits_difference"] < 0.1 * rough["logits_largest"]
    assert sorted(path.name for path in small.glob("*onnx*")) == ["model.onnx"]


@pytest.mark.soak  # llm-compressor holds transformers below ours: it runs in an environment of its own
def test_gptq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llmcompressor")
    run, _ = decoder_run(tmp_path / "run", LLAMA)
    rows = torch.randint(300, (16, 64), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(calibrated, "_calibration", lambda config: iter(rows))  # the run has no data
    out, measured = export_quantized(run, tmp_path / "out", "compressed-tensors", "gptq_int4")
    assert measured["bytes"] < 0.8 * measured["bytes_plain"]
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(out / "model.safetensors")


# ------------------------------------------------------------------------------------------------ refusals


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = decoder_run(tmp_path / "run", LLAMA)
    for format, quantize, said in (
        ("compressed-tensors", None, r"--quantize: is for quantized models, and RUN was trained without; give int8_dy"),
        ("torchao", "int4", r"--format='torchao': keeps int4 in 8 bits.*take compressed-tensors"),
        ("onnx", "int4", r"--quantize='int4': onnxruntime multiplies int8 with int8.*take int8_dynamic"),
    ):
        with pytest.raises(ConfigError, match=said):
            export_quantized(run, tmp_path / "out", format, quantize)
    gpt, _ = decoder_run(tmp_path / "gpt", GPT)
    with pytest.raises(ConfigError, match=r"transformer\.h\.0\.attn\.c_attn is transformers' Conv1D"):
        export_quantized(gpt, tmp_path / "out", "compressed-tensors", "int8")
    odd, _ = decoder_run(tmp_path / "odd", replace(LLAMA, ffn_dim=72))
    with pytest.raises(ConfigError, match=r"--quantize=32: model\.layers\.0\.mlp\.down_proj has 72 inputs.*24 divides"):
        export_quantized(odd, tmp_path / "out", "compressed-tensors", "int4")
    qat, _ = quantized_run(tmp_path / "qat", LLAMA, INT4)
    with pytest.raises(ConfigError, match=r"--quantize='int8': RUN has trained with quantized weights"):
        export_quantized(qat, tmp_path / "out", "compressed-tensors", "int8")
    find = importlib.util.find_spec
    gone = ("onnx", "llmcompressor")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith(gone) else find(name))
    with pytest.raises(ConfigError, match=r"--format='onnx': needs onnx; pip install 'bigtrain\[onnx\]'"):
        export_quantized(run, tmp_path / "out", "onnx", None)
    with pytest.raises(ConfigError, match=r"'gptq_int4': needs llm-compressor, which holds transf.*environment of its"):
        export_quantized(run, tmp_path / "out", "compressed-tensors", "gptq_int4")
    with pytest.raises(ConfigError, match=r"--quantize='awq_int4': has no format torchao|--format='torchao'"):
        export_quantized(run, tmp_path / "out", "torchao", "awq_int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt", "odd", "qat", "run"]

    for arguments, said in (
        (["--quantize", "int8"], "--quantize='int8': format huggingface holds no integers; take compressed-tensors"),
        (["--format", "onnx", "--encrypt"], "--encrypt=True: format onnx is read by programs that have no key"),
        (["--format", "gguf"], "'gguf' is not one of 'huggingface', 'compressed-tensors', 'torchao', 'onnx'"),
    ):
        assert cli._run(["export", str(run), "--out", str(tmp_path / "out"), *arguments]) == 2
        assert said in capsys.readouterr().err
