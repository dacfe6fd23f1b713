"""The planned memory against real ranks; benchmarks/plan_accuracy.py has the long table."""

from __future__ import annotations

from typing import Any

import pytest
from plan_accuracy import RECIPES, planned

from bigtrain.config import from_dict
from bigtrain.plan import memory, sizes
from bigtrain.plan.clusters import find
from tests.distributed.ranks import run_ranks

HELD_TO = [
    "GPT, ZeRO-0, bf16",
    "GPT, ZeRO-1, bf16, accumulation",
    "GPT, ZeRO-2, bf16, checkpointing",
    "BERT, ZeRO-2, bf16",
    "Llama, ZeRO-3, fp32",
]


def test_states_and_peak_of_real_ranks() -> None:
    recipes = [RECIPES[name] for name in HELD_TO]
    measured = run_ranks("plan_accuracy:measure", 2, {"recipes": recipes})
    for number, (name, recipe) in enumerate(zip(HELD_TO, recipes, strict=True)):
        plan = planned(recipe, 2)
        real = measured[0][number]["parts"]
        for part in ("parameters", "master", "optimizer"):
            assert plan.states.get(part, 0) == pytest.approx(real[part], rel=1e-3), (name, part)
        peak = max(of_rank[number]["peak"] for of_rank in measured)
        assert plan.peak.total == pytest.approx(peak, rel=0.03), name


def estimate(stage: int, ranks: int, dim: int = 512, **engine: Any) -> memory.Memory:
    model = {"kind": "decoder", "dim": dim, "n_layers": 8, "n_heads": 8, "vocab_size": 8192, "max_seq_len": 256}
    config = from_dict(
        {"model": model, "engine": {"kind": "deepspeed", "stage": stage} | engine, "train": {"global_batch": ranks}}
    )
    return memory.estimate(config, ranks, sizes.of_run(config), "cuda")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_never_need_more_states(stage: int) -> None:
    held = [sum(estimate(stage, ranks).states.values()) for ranks in (1, 2, 4, 8, 64)]
    assert held == sorted(held, reverse=True)


def test_a_higher_stage_never_needs_more_states() -> None:
    held = [sum(estimate(stage, 8, bucket_mib=1).states.values()) for stage in (0, 1, 2, 3)]
    assert held == sorted(held, reverse=True)


def test_offload_moves_states_off_the_device() -> None:
    wide = 16384  # 26B parameters: more than DeepSpeed swaps at a time
    there, moved = estimate(3, 8, wide), estimate(3, 8, wide, offload_optimizer="cpu")
    kept = there.states["master"] + there.states["optimizer"]
    assert moved.peak.total < there.peak.total
    assert moved.host > kept
    assert not moved.disk
    on_disk = estimate(3, 8, wide, offload_optimizer="nvme", nvme_path="/nvme")
    assert on_disk.disk >= kept
    assert on_disk.host < moved.host


def test_what_comes_on_top_of_the_tensors() -> None:
    plan = estimate(2, 8)
    device = find("h100").device
    needed = memory.needed(plan, device)
    assert needed["context"] == device.context_gib
    assert needed["peak"] >= plan.peak.total / 2**30 + device.context_gib


def test_the_norm_is_of_pieces_as_large_as_the_engine_makes_them() -> None:
    from bigtrain.engine import deepspeed

    assert memory.NORM_PIECE == deepspeed.NORM_PIECE
