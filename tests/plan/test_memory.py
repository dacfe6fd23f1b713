"""The planned memory against real ranks; benchmarks/plan_accuracy.py has the long table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_accuracy import RECIPES, planned

from bigtrain.config import from_dict
from bigtrain.plan import memory, sizes
from bigtrain.plan.clusters import find
from tests.distributed.ranks import run_ranks
from tests.runs import bigtrain

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
        peak = max(of_rank[number]["peak"] for of_rank in measured)  # of steps, without a save or an evaluation
        assert plan.certain.total == pytest.approx(peak, rel=0.03), name


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


def test_what_is_updated_at_a_time_ends_with_the_parameter_that_reaches_the_limit() -> None:
    """As in DeepSpeed's stage3.py, `_create_fp16_sub_groups`; each of its four buffers holds the largest."""
    table, square = 8192 * 512, 512 * 512
    of_one, of_many = (
        estimate(3, 1, offload_optimizer="nvme", nvme_path="/nvme",
                 deepspeed={"zero_optimization": {"sub_group_size": size}}).host
        for size in (1, table + 1)
    )  # fmt: skip
    largest = (3 + 1 + 4 + 4) * square + (3 + 1 + 4) * square  # a block's matrices, and three of the next's
    assert of_many - of_one == (4 + 2) * 4 * (largest - table)  # buffers, and the moments that the first step makes


@pytest.mark.soak
def test_a_billion_parameters_take_what_the_plan_said(tmp_path: Path) -> None:
    """Of the resident memory of a rank: mapped libraries, the interpreter and all."""
    bigtrain("train", "experiment=billion_on_a_laptop", f"run_dir={tmp_path}", timeout=1500)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["model/parameters"] > 1.0e9
    assert (result["status"], result["train/steps"], result["train/dropped_updates"]) == ("finished", 3, 0)
    planned = result["plan/peak_memory_gib"]  # of the last evaluation, which is counted from above
    assert 0.92 * planned < result["perf/peak_memory_gib"] < 1.03 * planned


def test_what_comes_on_top_of_the_tensors() -> None:
    plan = estimate(2, 8)
    device = find("h100").device
    needed = memory.needed(plan, device)
    assert needed["context"] == device.context_gib
    assert needed["peak"] >= plan.peak.total / 2**30 + device.context_gib


def test_a_rank_that_traces_nothing_has_fewer_libraries() -> None:
    """Which is what engine/lean.py is for. A GPU's context is another matter."""

    laptop, h100 = (find(name).device for name in ("laptop", "h100"))
    assert memory.needed(estimate(2, 2), laptop)["context"] == pytest.approx(laptop.context_gib - memory.TRACER_GIB)
    assert memory.needed(estimate(3, 2), laptop)["context"] == laptop.context_gib
    assert memory.needed(estimate(2, 2), h100)["context"] == h100.context_gib


def test_the_norm_is_of_pieces_as_large_as_the_engine_makes_them() -> None:
    from bigtrain.engine import deepspeed

    assert memory.NORM_PIECE == deepspeed.NORM_PIECE


def of_task(kind: str, model: str = "encoder", **task: Any) -> memory.Memory:
    shape = {"kind": model, "dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 8192, "max_seq_len": 128}
    config = from_dict(
        {"model": shape, "task": {"kind": kind} | task, "engine": {"kind": "deepspeed", "bucket_mib": 1}, "train":
         {"global_batch": 2, "micro_batch": 1}}
    )  # fmt: skip
    return memory.estimate(config, 2, sizes.of_run(config), "cpu")


def test_the_last_evaluation_is_covered() -> None:
    """Its batches are of 4,096 tokens, whatever train.micro_batch is, and some tasks look at whole logits in fp32."""
    from bigtrain import trainer

    assert memory.EVAL_TOKENS == trainer.EVAL_TOKENS
    found = of_task("instruction", "decoder")
    assert found.peak.name == "evaluation"
    assert found.peak.parts["logits"] >= 4096 * 8192 * (4 + 4)  # logits and their logarithms
    masked = of_task("masked_lm")
    scored = round(4096 * 0.15)
    assert dict((each.name, each.parts) for each in masked.moments)["evaluation"]["logits"] > scored * 8192 * (2 + 4)
    greedy, beams = (of_task("translation", "seq2seq", num_beams=number) for number in (1, 8))
    assert beams.peak.total > greedy.peak.total
    assert found.certain.total < found.peak.total  # by which no run is refused


def test_what_evaluates_is_in_a_ranks_libraries() -> None:
    laptop = find("laptop").device
    context = {kind: memory.needed(of_task(kind), laptop)["context"] for kind in ("masked_lm", "tagging")}
    assert context["tagging"] - context["masked_lm"] == pytest.approx(memory.EVALUATING_GIB["tagging"])
    assert memory.needed(of_task("classification"), laptop)["kernels"] > 0


def test_a_save_that_has_no_room_takes_no_copy() -> None:
    roomy, tight = find("laptop").device, replace(find("laptop").device, memory_gib=0.8)
    found = memory.Memory(
        {},
        (memory.Moment("loss", {"a": 1}), memory.Moment("save", {"snapshot": 2**29})),
        of_task("tagging").activations,
    )
    assert memory.saving_in_room(found, roomy).peak.name == "save"
    assert memory.saving_in_room(found, tight).peak.name == "loss"
