"""Every fault in a checkpoint's files is found before a tensor is used."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from bigtrain import models
from bigtrain.checkpoint.find import read
from bigtrain.checkpoint.integrity import below, damaged, read_manifest, seal
from bigtrain.checkpoint.weights import read_weights, write_weights
from bigtrain.config import DecoderConfig
from bigtrain.errors import BigtrainError

FAULTS = 1000
PAGE_BYTES = 4096


def make(path: Path) -> Path:
    """A checkpoint with files of every kind that there are: consolidated weights, torch's zip files, JSON."""
    model = models.build(DecoderConfig(dim=32, n_layers=2, n_heads=2, vocab_size=128, max_seq_len=16))
    optimizer = torch.optim.AdamW(model.parameters())
    (path / "engine").mkdir(parents=True)
    write_weights(path, ((name, tensor.detach()) for name, tensor in model.named_parameters()), shard_bytes=40_000)
    for rank in range(2):
        torch.save({"rank": rank, "optimizer": optimizer.state_dict()}, path / "engine" / f"rank_{rank}_states.pt")
        torch.save({"cpu": torch.get_rng_state() + rank}, path / f"random-{rank:05d}.pt")
    seal(path, {"step": 7, "world_size": 2, "hooks": {"WandbHook": {"id": "Zürich"}}})
    return path


def flip(draw: random.Random, path: Path, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def zero(draw: random.Random, path: Path, file: Path) -> None:
    data = bytearray(file.read_bytes())
    pages = [at for at in range(0, len(data), PAGE_BYTES) if any(data[at : at + PAGE_BYTES])]
    at = draw.choice(pages)
    data[at : at + PAGE_BYTES] = bytes(len(data[at : at + PAGE_BYTES]))
    file.write_bytes(data)


def truncate(draw: random.Random, path: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def swap(draw: random.Random, path: Path, file: Path) -> None:
    other = draw.choice([other for other in path.rglob("*.*") if other.is_file() and other != file])
    first, second = file.read_bytes(), other.read_bytes()
    assert first != second
    file.write_bytes(second)
    other.write_bytes(first)


def remove(draw: random.Random, path: Path, file: Path) -> None:
    file.unlink()


def test_a_thousand_faults_are_all_found(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = make(tmp_path / "step-00000007")
    original = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    assert damaged(whole) == {}
    missed = []
    for number in range(FAULTS):
        fault = (flip, flip, zero, truncate, swap, remove)[number % 6]
        file = draw.choice(list(original))
        fault(draw, whole, file)
        if not damaged(whole):
            missed.append((fault.__name__, file.name))
        for changed, data in original.items():
            if not changed.exists() or changed.read_bytes() != data:
                changed.write_bytes(data)
    assert missed == []
    assert damaged(whole) == {}


def test_a_manifest_is_for_people_and_carries_its_own_checksum(tmp_path: Path) -> None:
    path = make(tmp_path / "step-00000007")
    text = (path / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest == read_manifest(path)
    assert manifest["files"].keys() == set(below(path))
    assert manifest["hooks"]["WandbHook"]["id"] == "Zürich"
    (path / "manifest.json").write_text(text.replace('"step": 7', '"step": 8'))
    assert "checksum differs" in str(read(path))


@pytest.mark.parametrize("fault", [flip, truncate, remove])
def test_nothing_is_read_from_a_damaged_file(tmp_path: Path, fault: object) -> None:
    path = make(tmp_path / "step-00000007")
    read_weights(path)
    victim = sorted(path.glob("*.safetensors"))[-1]
    fault(random.Random(1), path, victim)  # type: ignore[operator]
    with pytest.raises(BigtrainError, match=rf"damaged \({victim.name}.*checkpoint verify"):
        read_weights(path)
    (path / "manifest.json").unlink()
    with pytest.raises(BigtrainError, match=r"damaged \(manifest\.json"):
        read_weights(path)


def test_a_file_that_does_not_belong_is_a_fault(tmp_path: Path) -> None:
    path = make(tmp_path / "step-00000007")
    shutil.copy(path / "random-00000.pt", path / "engine" / "mp_rank_01_model_states.pt")
    assert damaged(path) == {"engine/mp_rank_01_model_states.pt": "not in the manifest"}
