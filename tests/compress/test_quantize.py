"""Quantized layers: torchao's numbers, real gradients, plain names, exact conversion; and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain import checks, models
from bigtrain.compress import quantize
from bigtrain.compress.float8 import Float8
from bigtrain.compress.quantize import Quantize, Scheme
from bigtrain.compress_config import Float8Config, PruneConfig, QuantizeConfig
from bigtrain.config import AccelerateConfig, Config, DecoderConfig, DeepSpeedConfig, EncoderConfig, Seq2SeqConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.hardware import Placement, check_precision
from bigtrain.transform import load
from tests.distributed.curves import ENGINES
from tests.distributed.ranks import run_ranks

torchao = pytest.importorskip("torchao")
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer  # noqa: E402

SIZES = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 96, "max_seq_len": 16, "init_std": 0.2}
MODELS: dict[str, Any] = {
    "decoder": DecoderConfig(**SIZES),
    "encoder": EncoderConfig(**SIZES),
    "seq2seq": Seq2SeqConfig(n_decoder_layers=2, **SIZES),
}
SCHEMES = {
    "int8_dynamic": Scheme(8, None, True),
    "int8": Scheme(8, None, False),
    "int4": Scheme(4, 16, False),
    "int2": Scheme(2, 16, False),
}


def built(kind: str = "decoder", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return models.build(MODELS[kind]).to(dtype).eval()


def outputs(model: nn.Module, kind: str) -> Tensor:
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model(tokens, targets_in=tokens) if kind == "seq2seq" else model(tokens)


def enabled(model: nn.Module, scheme: Scheme) -> nn.Module:
    quantize.prepare(model, scheme, ["*"], ["*head"])
    for layer in quantize.layers(model).values():
        layer.enabled = True
    return model


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 16), (2, 32)])
def test_the_numbers_are_torchaos_at_every_precision(bits: int, group: int | None) -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(24, 64), Scheme(bits, group, False)
    weight[:, ::3] = 0  # as pruning leaves it
    scale = quantize.scales(weight, scheme)
    found = quantize.rounded(weight, None, scheme)
    dtype = {8: torch.int8, 4: torch.int4, 2: torch.int2}[bits]
    theirs = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, group_size=group or 64, is_symmetric=True))
    theirs(weight)
    torch.testing.assert_close(scale, theirs.scale, rtol=2**-8, atol=0)  # ours has bfloat16's bits
    theirs.config.is_dynamic, theirs.scale = False, scale
    assert torch.equal(found, theirs(weight))
    assert not found[weight == 0].any()
    assert torch.equal(scale, scale.bfloat16().float())
    half = weight.bfloat16()
    assert torch.equal(quantize.rounded(half, None, scheme), quantize.rounded(half.float(), None, scheme).bfloat16())
    # A group has at most so many values, and none is further than a step from its weight.
    assert found.view(24, -1, group or 64)[0, 0].unique().numel() <= 2**bits
    error = (found - weight).abs() / scale.repeat_interleave(group or 64, 1)
    assert float(error.max()) <= 1  # the largest of a group is clipped by up to half a step more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_computes_with_them_and_converts_exactly(kind: str, dtype: torch.dtype) -> None:
    plain = built(kind, dtype)
    names = [name for name, _ in plain.named_parameters()]
    before = outputs(plain, kind)
    errors = []
    for scheme in SCHEMES.values():
        model = copy.deepcopy(plain)
        quantize.prepare(model, scheme, ["*"], [])
        assert torch.equal(outputs(model, kind), before)  # not enabled yet
        enabled(model, scheme)
        assert list(model.state_dict()) == list(plain.state_dict())
        trained = outputs(model, kind)
        errors.append(float((trained - before).float().abs().mean()))
        converted = quantize.convert(model)
        assert not quantize.layers(converted)
        assert [name for name, _ in converted.named_parameters()] == names
        assert torch.equal(outputs(converted, kind), trained)
    assert 0 < errors[1] <= errors[0] < errors[2] < errors[3]


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_pass_as_if_nothing_was_rounded(name: str) -> None:
    torch.manual_seed(0)
    scheme = SCHEMES[name]
    layer = nn.Sequential(nn.Linear(32, 8))
    enabled(layer, scheme)
    (linear,) = quantize.layers(layer).values()
    x = torch.randn(2, 3, 32, requires_grad=True)
    layer(x).square().sum().backward()
    tokens, scale = quantize.token_integers(x.detach().view(-1, 32))
    used = (tokens * scale).view_as(x) if scheme.activations else x.detach()
    used.requires_grad_()
    weight = quantize.rounded(linear.weight.detach(), None, scheme).requires_grad_()
    bias = linear.bias.detach().requires_grad_()
    F.linear(used, weight, bias).square().sum().backward()
    for mine, reference in ((x, used), (linear.weight, weight), (linear.bias, bias)):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_a_subclass_goes_on_doing_what_it_does() -> None:
    """BERT's pooler is a linear layer that ends in tanh."""
    model = models.build(replace(MODELS["encoder"], pooler=True)).eval()
    hidden = torch.randn(2, 5, 32)
    before = model.pool(hidden)
    enabled(model, Scheme(8, None, False))
    after = model.pool(hidden)
    assert after.shape == (2, 32)
    assert 0 < float((after - before).detach().abs().max()) < 0.05
    kind = type(model.pooler)
    quantize.convert(model)
    assert issubclass(kind, type(model.pooler))
    torch.testing.assert_close(model.pool(hidden), after)


def test_the_schedule() -> None:
    transform = Quantize(QuantizeConfig(bits=4, group_size=16, start=2))
    model = built()
    before = outputs(model, "decoder")
    transform.apply(model)
    seen = []
    for step in range(4):
        transform.update(step)
        seen.append(torch.equal(outputs(model, "decoder"), before))
    assert seen == [True, True, False, False]
    assert transform.metrics() == {"compress/weight_bits": 4.0}
    assert {scale.numel() for scale in transform.state().values()} == {0}
    with pytest.raises(BigtrainError, match=r"quantized layers are others: blocks\.0\.attention\.out\.weight"):
        transform.load_state(
            {name: scale for name, scale in transform.state().items() if "0.attention.out" not in name}
        )


def test_it_may_begin_at_a_checkpoint_of_a_dense_run(tmp_path: Path) -> None:
    transform = Quantize(QuantizeConfig(bits=4, group_size=16, start=2, freeze=2))
    transform.apply(built())
    load([transform], tmp_path, tmp_path)
    transform.update(1)
    assert not transform.frozen


def test_training_compiled() -> None:
    torch.manual_seed(0)
    layers, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh()), torch.randn(4, 16)
    expected = enabled(layers, SCHEMES["int8_dynamic"])(x)
    (gradient,) = torch.autograd.grad(expected.sum(), layers[0].weight)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), layers[0].weight)[0], gradient)


@pytest.mark.parametrize(
    ("engines", "precision"),
    [
        (["zero2", "zero3"], "bf16"),
        pytest.param(
            ["zero0", "zero1", "zero2_offload", "zero3_offload", "ddp", "fsdp2"], "fp32", marks=pytest.mark.soak
        ),
    ],
)
def test_in_training_on_two_ranks(engines: list[str], precision: str, tmp_path: Path) -> None:
    """The same losses whatever the engine; scales frozen of the whole weights, and kept by a run that goes on with
    another ZeRO stage."""
    settings = {"bits": 4, "group_size": 32}
    zero = [name for name in engines if name.startswith("zero")]
    for choices in (zero, *([name] for name in engines if name not in zero)):  # FSDP2 goes on as it was saved only
        found, _ = run_ranks(
            "tests.compress.quantized:trained", 2,
            {"choices": {name: ENGINES[name] for name in choices}, "precision": precision, "settings": settings,
             "folder": str(tmp_path)},
        )  # fmt: skip
        first = found[choices[0]]["curve"]
        for seen in found.values():
            assert seen["exact"]
            assert seen["held"]
            assert seen["curve"] == pytest.approx(first, rel=2e-2 if precision == "bf16" else 1e-3)
            assert seen["resumed"] == pytest.approx(seen["curve"][-3:], rel=2e-2 if precision == "bf16" else 1e-3)


# ------------------------------------------------------------------------------------------------- float8


def test_float8_layers_have_the_names_they_had() -> None:
    torch.manual_seed(0)
    model = built()
    names = [name for name, _ in model.named_parameters()]
    before = outputs(model, "decoder")
    Float8(Float8Config()).apply(model)  # no GPU here: torchao emulates the numbers
    assert [name for name, _ in model.named_parameters()] == names
    after = outputs(model, "decoder")
    assert 0 < float((after - before).abs().max()) < 0.3 * float(before.abs().max())
    loss, _ = model(torch.arange(24).view(2, 12), torch.arange(24).view(2, 12))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("quantize_config", "said"),
    [
        (QuantizeConfig(bits=3), r"compress\.quantize\.bits=3: not a width"),
        (QuantizeConfig(bits=4, activations=True), r"activations=True: int8 inputs are multiplied"),
        (QuantizeConfig(group_size=32, activations=True), r"activations=True: int8 inputs are multiplied"),
        (QuantizeConfig(group_size=1), r"compress\.quantize\.group_size=1: must be at least 2"),
        (QuantizeConfig(start=5, freeze=4), r"compress\.quantize\.freeze=4: must be at least 5"),
    ],
)
def test_configs_that_are_refused(quantize_config: QuantizeConfig, said: str) -> None:
    config = Config()
    config.compress.quantize = quantize_config
    with pytest.raises(ConfigError, match=said):
        checks.check(config)


def test_layers_that_are_refused() -> None:
    for config, said in (
        (QuantizeConfig(include=["*attn*"]), r"include='\*attn\*': matches no linear layer.*blocks\.0\.attention\.qkv"),
        (
            QuantizeConfig(bits=4, group_size=24),
            r"group_size=24: blocks\.0\.attention\.qkv has 32 inputs, not divisible by it; 16 divides them",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            Quantize(config).apply(built())


def test_what_the_hardware_has_not() -> None:
    cpu = Placement("cpu", 1, 1, ())
    config = Config()
    config.compress.float8 = Float8Config()
    with pytest.raises(ConfigError, match=r"compress\.float8='tensorwise': needs float8.*this run is on the CPU"):
        check_precision(config, cpu)
    for engine in (
        DeepSpeedConfig(stage=3, quantized_communication=True),
        DeepSpeedConfig(stage=3, deepspeed={"zero_optimization": {"zero_quantized_weights": True}}),
    ):
        with pytest.raises(ConfigError, match=r"quantize.*=True: ZeRO\+\+ quantizes what it sends with CUDA kernels"):
            check_precision(Config(engine=engine), cpu)
    for engine in (DeepSpeedConfig(stage=3), AccelerateConfig()):
        check_precision(Config(engine=engine), cpu)
    with pytest.raises(ConfigError, match=r"needs engine\.stage=3, not 2"):
        checks.check(Config(engine=DeepSpeedConfig(stage=2, quantized_communication=True)))


def test_combinations_that_are_refused() -> None:
    config = Config(engine=DeepSpeedConfig(stage=2))
    config.compress.float8 = Float8Config()
    checks.check(config)
    config.compress.prune = PruneConfig()
    config.compress.quantize = QuantizeConfig()
    with pytest.raises(ConfigError, match="take one of both"):
        checks.check(config)
    config.compress.quantize = None
    with pytest.raises(ConfigError, match="ZeRO-3 would keep"):
        checks.check(replace(config, engine=DeepSpeedConfig(stage=3)))
