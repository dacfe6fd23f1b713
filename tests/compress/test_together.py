"""Pruning, int4 training and distillation in one sharded run: trained, killed, resumed, exported, its zeros zero."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bigtrain.checkpoint import newest
from bigtrain.checkpoint.weights import read_weights
from bigtrain.config import DecoderConfig, load, to_dict
from bigtrain.models import huggingface
from bigtrain.models.huggingface import names
from tests.distributed.ranks import run_ranks
from tests.runs import TINY, Running, bigtrain, losses, metrics, result

STEPS = 12
GROUP = 32  # of conf/compress/qat_int4.yaml
# Of these shapes, so that a format of int4 has it.
LLAMA = DecoderConfig(
    dim=64, n_layers=1, n_heads=2, max_seq_len=64, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False
)


@pytest.mark.soak
def test_half_sparse_int4_and_distilled_under_zero3_survives_a_kill(
    trained_run: Path, data_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [
        "train", *TINY, f"run_dir={run}", f"data.cache_dir={data_cache}", "engine=zero3", "launch.ranks=2",
        "launch.restarts=0", "model.n_layers=1", "model.positions=rotary", "model.norm=rmsnorm",
        "model.activation=swiglu", "model.bias=false", f"train.steps={STEPS}", "train.micro_batch=2",
        "train.save_every=3", "train.eval_every=0", "logger=quiet", "compress=[prune_global,qat_int4,distil]",
        "compress.prune.sparsity=0.5", "compress.prune.schedule={begin: 1, end: 6, every: 1}",
        f"compress.distil.teacher={trained_run}", "compress.distil.hidden=0.1", "compress.distil.teacher_sharded=true",
    ]  # fmt: skip
    process = Running(*arguments)
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "step-00000003" / "manifest.json").is_file():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(2)  # its ranks see it and end
    bigtrain(*arguments)
    assert result(run)["status"] == "finished"
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    told = [line for line in metrics(run) if "compress/sparsity" in line]
    assert told[-1]["compress/sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert all(line["train/distil_loss"] > 0 for line in told)

    checkpoint = newest(run)
    assert checkpoint is not None
    packed = load_file(checkpoint / "compress" / "prune.safetensors")
    weights = read_weights(checkpoint)
    gone = {
        name: torch.from_numpy(np.unpackbits(bits.numpy())[: weights[name].numel()] == 0).view_as(weights[name])
        for name, bits in packed.items()
    }
    assert sum(int(mask.sum()) for mask in gone.values()) == round(0.5 * sum(mask.numel() for mask in gone.values()))
    bigtrain("export", str(run), "--out", str(tmp_path / "hf"))
    config = huggingface.read_config(tmp_path / "hf")
    exported = dict(huggingface.iterate_weights(tmp_path / "hf", config))
    for name, mask in gone.items():
        assert not exported[name][mask].any(), name
        groups = exported[name].view(-1, GROUP)  # what was trained is what int4 holds: 16 values at most in a group
        assert max(len(group.unique()) for group in groups) <= 16, name
        torch.testing.assert_close(exported[name].float(), weights[name].float(), atol=0.02, rtol=0)
        assert exported[name].any()
    bigtrain("export", str(run), "--format", "compressed-tensors", "--out", str(tmp_path / "int4"))
    _check_packed(tmp_path / "int4", gone)


def _check_packed(directory: Path, gone: dict[str, torch.Tensor]) -> None:
    """The integers in the file: what was masked is zero there, too."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    stored = load_file(directory / "model.safetensors")
    integers = {
        name.removesuffix("_packed"): unpack_from_int32(
            packed, 4, torch.Size(stored[name.replace("_packed", "_shape")].tolist())
        )
        for name, packed in stored.items()
        if name.endswith("_packed")
    }
    rules = {rule.ours: rule for rule in names.LLAMA.rules(LLAMA)}
    for name, mask in gone.items():
        whole = torch.cat([integers[f"model.{theirs}"] for theirs in rules[name].theirs])
        assert not whole[mask].any(), name
        assert whole.any()


def test_masks_and_scales_are_sealed_and_come_back_at_another_stage(trained_run: Path, tmp_path: Path) -> None:
    """With `train.encryption`: nothing of the transforms lies in the clear, and whoever has the key goes on from it."""
    key = tmp_path / "key"
    key.write_text("5a" * 32)
    key.chmod(0o600)
    first = to_dict(load(trained_run / "config.yaml"))
    first |= {
        "train": first["train"] | {"steps": 6, "encryption": {"key_file": str(key)}},
        "engine": {"kind": "deepspeed", "stage": 2},
        "compress": {
            "prune": {"sparsity": 0.75, "schedule": {"kind": "linear", "begin": 1, "end": 4, "every": 1}},
            "quantize": {"bits": 4, "group_size": GROUP, "start": 1, "freeze": 2},
        },
    }
    following = first | {"engine": {"kind": "deepspeed", "stage": 3}}
    arguments = {"first": first, "following": following, "folder": str(tmp_path / "run"), "saved": 3, "end": 6}
    found, _ = run_ranks("tests.compress.composed:sealed", 2, arguments)
    assert found["loaded"] == found["states"]
    assert {name.split()[0] for name in found["states"]} == {"prune", "quantize"}
    assert found["quantized"] == found["layers"] != []
    assert found["zeros"] == round(0.75 * found["total"])
    assert found["late"] == (
        "compress.prune: asked for after the model was sharded; transforms come first, where the model is built"
        " (build_model of bigtrain.engine.start.build)"
    )
    size = found["total"]
    ramp = [0, 1 / 3, 2 / 3, 1, 1, 1]
    assert [line["compress/sparsity"] for line in found["told"]] == [round(0.75 * at * size) / size for at in ramp]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    written = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert {"compress/prune.safetensors.enc", "compress/quantize.safetensors.enc"} <= written
    assert {name for name in written if not name.endswith(".enc")} == {"manifest.json", "encryption.json"}
