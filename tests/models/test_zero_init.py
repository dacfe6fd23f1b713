"""The decoder inside `deepspeed.zero.Init` and under ZeRO-3: same weights, loss and gradients as on one process."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from bigtrain.config import DecoderConfig
from bigtrain.models import build
from tests.distributed.ranks import run_ranks

LLAMA = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}
CONFIGS = {
    "gpt": DecoderConfig(dim=64, n_layers=3, n_heads=4, vocab_size=512, max_seq_len=32),
    "llama": DecoderConfig(dim=64, n_layers=3, n_heads=4, vocab_size=512, max_seq_len=32, **LLAMA),  # type: ignore[arg-type]
}


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(1))
    loss, _ = model(tokens, tokens.roll(-1, 1), label_smoothing=0.1, z_loss=1e-3)
    return loss / tokens.numel()


def run_rank(name: str, dtype: str, output: str) -> None:
    """One gloo rank: build inside zero.Init, save the gathered weights, the loss and the gathered gradients."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an op for inference: it would be built, never used
    deepspeed.init_distributed("gloo", verbose=False)
    settings = {
        "train_batch_size": 2 * int(os.environ["WORLD_SIZE"]),
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_scatter": True},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    torch.manual_seed(int(os.environ["RANK"]))  # other ranks' draws must not matter: rank 0 broadcasts its own
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = build(CONFIGS[name])
    weights = {}
    for key, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[key] = parameter.detach().clone()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=settings
    )
    loss = loss_of(engine)
    engine.backward(loss)
    gradients = {key: safe_get_full_grad(parameter) for key, parameter in model.named_parameters()}
    if int(os.environ["RANK"]) == 0:
        torch.save({"weights": weights, "loss": loss.detach(), "gradients": gradients}, output)


@pytest.mark.parametrize(
    ("name", "dtype", "ranks"), [("gpt", "fp32", 1), ("gpt", "fp32", 2), ("gpt", "bf16", 2), ("llama", "fp32", 2)]
)
def test_zero_init(name: str, dtype: str, ranks: int, tmp_path: Path) -> None:
    run_ranks(f"{__name__}:run_rank", ranks, {"name": name, "dtype": dtype, "output": str(tmp_path / "result.pt")})
    result = torch.load(tmp_path / "result.pt")

    config = CONFIGS[name]
    torch.manual_seed(0)
    plain = build(config)
    expected = dict(plain.named_parameters())
    assert result["weights"].keys() == expected.keys()
    for key, weight in result["weights"].items():
        assert torch.equal(weight, expected[key].to(weight.dtype)), key
    residual = config.init_std / math.sqrt(2 * config.n_layers)
    assert result["weights"]["embedding.weight"].float().std().item() == pytest.approx(config.init_std, rel=0.05)
    assert result["weights"]["blocks.2.attention.out.weight"].float().std().item() == pytest.approx(residual, rel=0.05)

    plain.load_state_dict(result["weights"], strict=False)  # bf16: start from the rounded weights
    loss = loss_of(plain)
    loss.backward()
    half = dtype == "bf16"
    torch.testing.assert_close(result["loss"].float(), loss.detach(), rtol=5e-3 if half else 1e-5, atol=0)
    for key, gradient in result["gradients"].items():
        error = (gradient - expected[key].grad).norm() / expected[key].grad.norm()
        assert error < (5e-2 if half else 1e-4), (key, error)
