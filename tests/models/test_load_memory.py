"""What loading takes: the resident memory of real ranks, mapped files included, while they fill their models."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain import heap, models
from bigtrain.checkpoint.transfer import load_initial
from bigtrain.checkpoint.weights import write_weights
from bigtrain.config import DecoderConfig, from_dict
from bigtrain.engine import start
from bigtrain.engine.deepspeed import ds_config
from bigtrain.models.huggingface import auto, read_config, to_huggingface
from tests.distributed.ranks import run_ranks

MB = 1_000_000
SHARD = 24 * MB
SLACK = 60 * MB  # a parameter on its way (its pieces, fused, whole, gathered), and what the heap keeps of freed ones
LLAMA: dict[str, Any] = {
    "vocab_size": 2048, "dim": 512, "n_layers": 30, "n_heads": 8, "ffn_dim": 1408, "max_seq_len": 64, "bias": False,
    "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "tie_embeddings": False,
}  # fmt: skip
WATCHED = "blocks.29.feed_forward.down.weight"  # and what it is called in transformers' code:
THEIRS = "model.model.layers.29.mlp.down_proj.weight"


def directory(path: Path, **changes: Any) -> int:
    """A Llama with random weights in files of 24 MB; its bytes."""
    config = DecoderConfig(**LLAMA | changes)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in models.build(config).named_parameters()}
    draw = torch.Generator().manual_seed(0)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.rand(shape, generator=draw)

    settings, tensors = to_huggingface(config, weights(), "causal_lm")
    path.mkdir()
    write_weights(path, tensors, shard_bytes=SHARD)
    (path / "config.json").write_text(json.dumps(settings))
    return sum(4 * shape.numel() for shape in shapes.values())


def resident(field: str) -> int:
    """VmRSS, or VmHWM, its peak since `forget_peak`; bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure(kind: str, stage: int, small: str, large: str) -> dict[str, float]:
    """In a rank: how far the peak was above what was there before, and the sum of a weight, as proof.

    The small model goes first, so that code that is loaded at first use is not counted.
    """
    import deepspeed

    start.init_distributed("cpu", 120)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    loaded(Path(small), kind, stage)
    return loaded(Path(large), kind, stage)


def loaded(path: Path, kind: str, stage: int) -> dict[str, float]:
    """The model is born and filled as in the engine."""
    import deepspeed

    choice = {"engine": {"kind": "deepspeed", "stage": stage}, "train": {"precision": "fp32", "global_batch": 2}}
    config = read_config(path) if kind == "ours" else auto.read_config(path, "causal_lm")
    gc.collect()
    heap.trim()  # or it would take what an earlier model has left
    before = resident("VmRSS")
    forget_peak()
    sharded = stage == 3
    with ExitStack() as birth:
        if sharded:
            birth.enter_context(heap.trimmed_while_born())
            birth.enter_context(deepspeed.zero.Init(config_dict_or_path=ds_config(from_dict(choice), 2, "cpu")))
        model: Any = models.build(config) if isinstance(config, DecoderConfig) else auto.CausalLM(config)
        report = load_initial(model, str(path))
    peak = resident("VmHWM") - before
    assert not report.new
    assert not report.skipped
    weights = dict(model.named_parameters())
    weight = weights[next(name for name in (WATCHED, THEIRS, *weights) if name in weights)]
    with deepspeed.zero.GatheredParameters([weight], enabled=sharded):
        return {"peak": peak, "sum": float(weight.detach().double().sum())}


def test_a_load_takes_one_shard_over_the_model_and_under_zero_3_over_the_ranks_part(
    tmp_path: Path,
) -> None:
    directory(tmp_path / "small", dim=64, n_layers=2, ffn_dim=96, vocab_size=256)
    size = directory(tmp_path / "large")
    files = sorted((tmp_path / "large").glob("*.safetensors"))
    assert len(files) >= 8
    assert max(file.stat().st_size for file in files) < SHARD + MB
    paths = {"small": f"{tmp_path}/small", "large": f"{tmp_path}/large"}
    for kind, stage in itertools.product(("ours", "theirs"), (2, 3)):
        ranks = run_ranks("tests.models.test_load_memory:measure", 2, {"kind": kind, "stage": stage} | paths)
        print(kind, stage, [round(found["peak"] / MB) for found in ranks], "of", round(size / MB))
        assert len({found["sum"] for found in ranks}) == 1
        part = size / 2 if stage == 3 else size
        for found in ranks:
            assert 0.9 * part < found["peak"] < part + SHARD + SLACK  # above the first: it has been measured
    assert size / 2 + SHARD + SLACK < 0.8 * size  # what would not do for a rank that holds the model whole
