"""Consolidated weights: written in shards, read back, refused where they do not fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from bigtrain import models
from bigtrain.checkpoint.weights import (
    iterate_weights,
    load_into,
    load_matching,
    read_weights,
    reads,
    write_weights,
)
from bigtrain.config import DecoderConfig
from bigtrain.errors import BigtrainError
from tests.distributed.ranks import run_ranks

CONFIG = DecoderConfig(dim=16, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=8)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shard_bytes", [2**30, 5000])
def test_round_trip(shard_bytes: int, tmp_path: Path) -> None:
    model = models.build(CONFIG)
    write_weights(tmp_path, parameters(model).items(), shard_bytes)
    files = sorted(path.name for path in tmp_path.iterdir())
    if shard_bytes == 5000:
        assert "model.safetensors.index.json" in files
        assert len(files) > 3
        assert all((tmp_path / name).stat().st_size < 7000 for name in files if name.endswith(".safetensors"))
    else:
        assert files == ["model.safetensors"]
    other = models.build(CONFIG)
    load_into(other, tmp_path)
    assert all(torch.equal(tensor, parameters(other)[name]) for name, tensor in parameters(model).items())
    assert read_weights(tmp_path).keys() == parameters(model).keys()


def test_transformers_reads_the_layout(tmp_path: Path) -> None:
    from transformers.modeling_utils import load_state_dict

    model = models.build(CONFIG)
    write_weights(tmp_path, parameters(model).items())
    found = load_state_dict(str(tmp_path / "model.safetensors"))
    assert found.keys() == parameters(model).keys()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (DecoderConfig(dim=32, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=8), "in this model"),
        (DecoderConfig(dim=16, n_layers=1, n_heads=2, vocab_size=64, max_seq_len=8), "is not in this model"),
        (DecoderConfig(dim=16, n_layers=3, n_heads=2, vocab_size=64, max_seq_len=8), "which this model needs"),
    ],
)
def test_another_model_is_refused(other: DecoderConfig, words: str, tmp_path: Path) -> None:
    write_weights(tmp_path, parameters(models.build(CONFIG)).items())
    with pytest.raises(BigtrainError, match=words):
        load_into(models.build(other), tmp_path)


def test_damaged_and_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BigtrainError, match="holds no weights"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(BigtrainError, match="cannot be read"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    missing = '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    for text, said in (("{", "cannot be read"), ("[]", "cannot be read"), (missing, "is not there, though")):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(BigtrainError, match=said):
            read_weights(tmp_path)


@pytest.mark.parametrize("shard_bytes", [2**30, 5000])
def test_names_and_shapes_without_the_bytes(shard_bytes: int, tmp_path: Path) -> None:
    write_weights(tmp_path, parameters(models.build(CONFIG)).items(), shard_bytes)
    shapes = dict(iterate_weights(tmp_path, read=False))
    whole = read_weights(tmp_path)
    assert list(shapes) == list(whole)
    assert all(shapes[name].is_meta and shapes[name].shape == whole[name].shape for name in whole)


def test_what_fits_is_loaded_and_the_rest_is_told() -> None:
    source = parameters(models.build(CONFIG))
    other = models.build(DecoderConfig(dim=16, n_layers=3, n_heads=2, vocab_size=64, max_seq_len=12))
    before = parameters(other)
    report = load_matching(other, [*source.items(), ("adapter.weight", torch.ones(3))])
    assert report.skipped == {
        "positions.weight": "(8, 16) there, (12, 16) in this model",
        "adapter.weight": "not in this model",
    }
    assert set(report.new) == {"positions.weight", *(name for name in before if name.startswith("blocks.2."))}
    assert report.loaded == [name for name in source if name != "positions.weight"]
    for name, tensor in parameters(other).items():
        assert torch.equal(tensor, before[name] if name in report.new else source[name]), name


# ------------------------------------------------------------------------------- a model sharded by zero.Init


def run_rank(folder: str) -> None:
    """One of two gloo ranks: only rank 0 can read the weights' bytes, and both end up with all weights."""
    directory = Path(folder)
    import deepspeed

    from bigtrain.models.stored import StoredTensors

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an op for inference: it would be built, never used
    deepspeed.init_distributed("gloo", verbose=False)
    rank = int(os.environ["RANK"])
    read_tensor, bytes_read = StoredTensors.tensor, []

    def tensor(self: StoredTensors, name: str, read: bool = True) -> torch.Tensor:
        bytes_read.append(read)
        return read_tensor(self, name, read)

    StoredTensors.tensor = tensor  # type: ignore[method-assign]
    settings = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    wanted = torch.load(directory / "wanted.pt")
    for way in ("load_into", "load_matching"):
        torch.manual_seed(rank + 1)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = models.build(CONFIG)
        assert reads(model) == (rank == 0)
        if way == "load_into":
            load_into(model, directory)
        else:
            given = dict(iterate_weights(directory, reads(model)))
            del given["norm.weight"]
            given["positions.weight"] = given["positions.weight"][:4]
            report = load_matching(model, given.items())
            assert report.new == ["positions.weight", "norm.weight"]
            assert report.skipped == {"positions.weight": "(4, 16) there, (8, 16) in this model"}
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                same = torch.equal(parameter, wanted[name])
                assert same or (way == "load_matching" and name == "positions.weight"), name
    assert set(bytes_read) == {rank == 0}


def test_only_rank_0_reads_for_a_sharded_model(tmp_path: Path) -> None:
    wanted = parameters(models.build(CONFIG))
    torch.save(wanted, tmp_path / "wanted.pt")
    write_weights(tmp_path, wanted.items())
    run_ranks(f"{__name__}:run_rank", 2, {"folder": str(tmp_path)})
