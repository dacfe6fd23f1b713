"""Pruning under every ZeRO stage: exact, the same everywhere, held, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from bigtrain import models
from bigtrain.checks import check
from bigtrain.compress.layers import choose
from bigtrain.compress.prune import Prune
from bigtrain.compress_config import PruneConfig
from bigtrain.config import DecoderConfig, EncoderConfig, from_dict
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.hardware import cpu_has_fp16
from bigtrain.transform import load
from tests.distributed.curves import ENGINES
from tests.distributed.ranks import run_ranks

CHOICES = {name: choice for name, choice in ENGINES.items() if name != "fsdp2"}
GLOBAL = {"sparsity": 0.7}
WANDA = {"method": "wanda", "scope": "layer", "sparsity": 0.6}
BF16 = {"precision": "bf16"}
GROUPS = {"layer_lr_decay": 0.5}  # a parameter group for each layer


def test_sparsity_is_exact_at_every_step() -> None:
    """Zeros counted in the weights of a forward pass, against the schedule: global and by layer, N:M, all methods,
    accumulation (two micro-batches a step), several parameter groups, and steps that are left out. And what the
    methods choose is what their papers define."""
    cases = {f"global {name}": [choice, BF16, GLOBAL] for name, choice in CHOICES.items()} | {
        "left out zero1": [CHOICES["zero1"], BF16 | {"left_out": [2, 4]}, GLOBAL],
        "left out zero3": [CHOICES["zero3"], BF16 | {"left_out": [2, 4]}, GLOBAL],
        "groups zero2": [CHOICES["zero2"], GROUPS, GLOBAL],
        "groups zero3": [CHOICES["zero3"], GROUPS, {"scope": "layer"}],
        "movement zero1": [CHOICES["zero1"], BF16, {"method": "movement"}],
        "movement zero3_offload": [CHOICES["zero3_offload"], {}, {"method": "movement", "scope": "layer"}],
        "movement ddp": [CHOICES["ddp"], {}, {"method": "movement"}],
        "wanda zero2": [CHOICES["zero2"], BF16, WANDA],
        "wanda zero3": [CHOICES["zero3"], {}, WANDA],
        "wanda 4:8 ddp": [CHOICES["ddp"], {}, WANDA | {"pattern": "4:8"}],
        "2:4 zero2_offload": [CHOICES["zero2_offload"], BF16, {"pattern": "2:4", "scope": "layer"}],
        "2:4 zero3": [CHOICES["zero3"], BF16, {"pattern": "2:4", "scope": "layer"}],
    }
    if cpu_has_fp16():  # where the loss scale overflows by itself, too
        cases |= {
            f"fp16 {name}": [CHOICES[name], {"precision": "fp16", "left_out": [3]}, GLOBAL]
            for name in ("zero2", "zero3")
        }
    half = {"scope": "layer", "schedule": {"kind": "constant", "begin": 1}}
    judged = {
        f"{method} by definition {name}": [CHOICES[name], {}, half | {"method": method}]
        for method, name in (("wanda", "zero2"), ("wanda", "zero3"), ("movement", "zero1"), ("movement", "zero3"))
    }
    for wrong in run_ranks("tests.compress.sparse:walk", 2, {"cases": cases, "judged": judged}):
        assert wrong == {name: [] for name in cases | judged}


PRUNES = {
    "global": GLOBAL, "layer": {"scope": "layer"}, "2:4": {"pattern": "2:4", "scope": "layer"},
    "4:8": {"pattern": "4:8", "scope": "layer"},
}  # fmt: skip


@pytest.mark.parametrize(
    "ranks", [pytest.param([1, 2], id="1,2"), pytest.param([1, 2, 4], id="1,2,4", marks=pytest.mark.soak)]
)
def test_masks_are_the_same_at_every_stage_and_number_of_ranks(ranks: list[int]) -> None:
    found: dict[str, set[str]] = {}
    arguments = {"choices": CHOICES, "precision": "fp32", "prunes": PRUNES}
    for world_size in ranks:
        for masks in run_ranks("tests.compress.sparse:same_weights", world_size, arguments):
            for title, hashes in masks.items():
                found.setdefault(title, set()).update(hashes.values())
                assert set(hashes) == set(CHOICES)
    assert {title: len(hashes) for title, hashes in found.items()} == dict.fromkeys(PRUNES, 1)
    assert len(set().union(*found.values())) == len(PRUNES)  # and four different ones


def test_a_sparse_run_goes_on_at_another_stage_and_number_of_ranks(tmp_path: Path) -> None:
    prunes = {"magnitude": GLOBAL, "movement": {"method": "movement"}}
    arguments = {"prunes": prunes, "folder": str(tmp_path)}
    saved = run_ranks("tests.compress.sparse:saved", 2, arguments | {"choice": CHOICES["zero2"]})
    choices = {name: CHOICES[name] for name in ("zero3", "zero0", "ddp")}
    (found,) = run_ranks("tests.compress.sparse:resumed", 1, arguments | {"choices": choices})
    assert found["of other layers"][""]["problem"] == (
        "the checkpoint's masks are of other layers: none for blocks.0.attention.qkv.weight"
    )
    assert found["slower"] == {name: {"same": True} for name in choices}
    for title in prunes:
        first = saved[0][title]
        assert (first["problem"], first["wrong"]) == (None, [])
        assert saved[1][title] == first
        assert first["masks_after"] != first["masks"]  # the ramp goes on
        assert found[title] == {name: {"masks": first["masks"], "wrong": []} for name in choices}
        (manifest,) = (tmp_path / title).glob("checkpoints/*/manifest.json")
        assert '"compress/prune.safetensors"' in manifest.read_text()
        weights = 2 * 64 * (192 + 64 + 256 + 256)  # of two layers
        size = (manifest.parent / "compress/prune.safetensors").stat().st_size
        scores = 4 * weights if title == "movement" else 0
        assert weights / 8 <= size - scores <= weights / 8 + 4096  # a bit for each weight, and the names


# ------------------------------------------------------------------------------------------------ bad input


def decoder(**fields: Any) -> nn.Module:
    return models.build(DecoderConfig(dim=32, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=16, **fields))


def test_layers_by_name() -> None:
    model = decoder()
    everything = [layer.module for layer in choose(model, ["*"], [], "compress.prune")]
    inner = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    assert everything == [f"blocks.{i}.{name}" for i in (0, 1) for name in inner]
    few = choose(model, ["*.0.feed_forward.*"], ["*.down"], "compress.prune")
    assert [(layer.weight, tuple(layer.shape)) for layer in few] == [("blocks.0.feed_forward.up.weight", (128, 32))]


def test_a_weight_of_two_modules_counts_once_and_an_embeddings_only_by_its_name() -> None:
    model = nn.Module()
    model.embedding, model.first, model.second, model.out = nn.Embedding(8, 4), *(nn.Linear(4, 4) for _ in range(3))
    model.out = nn.Linear(4, 8)
    model.second.weight = model.first.weight
    model.out.weight = model.embedding.weight
    assert [layer.weight for layer in choose(model, ["*"], [], "x")] == ["first.weight"]
    assert [layer.weight for layer in choose(model, ["out"], [], "x")] == ["embedding.weight"]


def test_heads_stay_whole_by_default() -> None:
    from bigtrain import tasks  # noqa: F401  (the heads' room)
    from bigtrain.models.heads import MaskedLMHead

    config = EncoderConfig(dim=32, n_layers=1, n_heads=2, vocab_size=64, max_seq_len=16)
    model = nn.Module()
    model.backbone = models.build(config)
    model.head = MaskedLMHead(config, model.backbone.embedding)
    chosen = choose(model, PruneConfig().include, PruneConfig().exclude, "x")
    assert chosen
    assert all(layer.module.startswith("backbone.blocks") for layer in chosen)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (PruneConfig(include=["*.mlp"]),
         r"^compress\.prune\.include='\*\.mlp': matches no linear layer.*there are blocks\.0\.attention\.qkv"),
        (PruneConfig(exclude=["*"]), r"^compress\.prune\.exclude='\*': leaves no layer; there are blocks"),
        (PruneConfig(pattern="2:5", scope="layer"),
         r"^compress\.prune\.pattern='2:5': blocks\.0\.attention\.qkv has 32 inputs, not divisible by 5; leave it out"),
    ],
    ids=["include", "exclude", "N:M"],
)  # fmt: skip
def test_what_the_model_does_not_have(prune: PruneConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prune(prune).apply(decoder())


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"sparsity": 1.0}, "compress.prune.sparsity=1.0: must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "compress.prune.sparsity=-0.1: must be at least 0 and below 1"),
        ({"pattern": "4:2", "scope": "layer"}, "compress.prune.pattern='4:2': is no N:M with 0 < N < M; 2:4 or 4:8"),
        ({"pattern": "half", "scope": "layer"}, "compress.prune.pattern='half': is no N:M"),
        ({"method": "wanda"}, "compress.prune.scope='global': wanda compares weights of a row"),
        ({"include": []}, "compress.prune.include=[]: names no layer"),
        ({"schedule": {"begin": 5, "end": 4}}, "compress.prune.schedule.end=4: lies before"),
        ({"schedule": {"begin": -1}}, "compress.prune.schedule.begin=-1: must be at least 0"),
        ({"schedule": {"every": 0}}, "compress.prune.schedule.every=0: must be at least 1"),
        ({"schedule": {"kind": "multi_step", "steps": [4, 2], "fractions": [0.5, 1.0]}}, "steps=[4, 2]: must rise"),
        ({"schedule": {"kind": "multi_step", "steps": [2, 4], "fractions": [0.5, 0.9]}}, "must rise from at least"),
        ({"schedule": {"kind": "multi_step", "steps": [2], "fractions": []}}, "fractions=[]: as many as"),
        ({"schedule": {"kind": "linear", "steps": [2]}}, "is for kind=multi_step, not linear"),
    ],
)  # fmt: skip
def test_what_cannot_be(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(from_dict({"compress": {"prune": prune}}))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_frozen_is_not_pruned() -> None:
    model = decoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks.1" in name)
    assert {layer.module.split(".")[1] for layer in choose(model, ["*"], [], "x")} == {"1"}


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BigtrainError, match=r"holds no state of compress\.prune .*cannot be continued.*init_from="):
        load([Prune(PruneConfig())], tmp_path, tmp_path)
