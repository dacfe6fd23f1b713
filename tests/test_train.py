"""The main job from end to end, by the command, on two real ranks."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.checkpoint import checkpoints
from bigtrain.checkpoint.weights import read_weights
from bigtrain.config import load
from tests.runs import TINY, Running, bigtrain, losses, metrics, result

import torch  # isort: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    bigtrain("train", *TINY, "model.dropout=0.1", "train.steps=24", f"run_dir={run}", f"data.cache_dir={data_cache}")
    return run


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    done = result(uninterrupted)
    assert done["status"] == "finished"
    assert done["train/steps"] == 24
    assert done["data/tokens"] == 24 * 8 * 64
    assert 1.5 < done["eval/gzip_bits_per_byte"] < 3
    assert done["eval/bits_per_byte"] > 1
    steps = [line for line in metrics(uninterrupted) if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 25))
    promised = {"train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_second", "perf/mfu",
                "perf/peak_memory_gib", "data/tokens"}  # fmt: skip
    assert promised <= steps[0].keys()
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    for name in (
        "config.yaml",
        "config.sha256",
        "launch.json",
        "plan.json",
        "ds_config.json",
        "tokenizer/tokenizer.json",
    ):
        assert (uninterrupted / name).is_file(), name
    config = load(uninterrupted / "config.yaml")
    assert config.model.vocab_size == 512
    weights = read_weights(max((uninterrupted / "checkpoints").iterdir()))
    assert sum(tensor.numel() for tensor in weights.values()) == done["model/parameters"]


def test_a_run_goes_on_cut_in_another_way(uninterrupted: Path, tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(uninterrupted, run)
    arguments = [*TINY, "model.dropout=0.1", "train.steps=30", f"run_dir={run}", f"data.cache_dir={data_cache}"]
    changed = ["engine=zero3", "launch.ranks=1", "train.global_batch=4", "optimizer.lr=1e-4"]
    output = bigtrain("train", *arguments, *changed, expect=2)
    assert "resume_allow=[optimizer.lr,train.global_batch]" in output
    output = bigtrain("train", *arguments, *changed, "resume_allow=[optimizer.lr,train.global_batch]")
    for pattern in (
        r"engine.stage +2 +-> 3",
        r"optimizer.lr +\S+ +-> 0.0001",
        r"train.global_batch +8 +-> 4",
        r"ranks +2 +-> 1",
    ):
        assert re.search(pattern, output), output
    done = result(run)
    assert done["status"] == "finished"
    assert done["data/tokens"] == (24 * 8 + 6 * 4) * 64
    curve = losses(run)
    assert sorted(curve) == list(range(1, 31))
    assert max(curve[step] for step in range(25, 31)) < curve[12]
    rates = {line["step"]: line["train/lr"] for line in metrics(run) if "train/lr" in line}
    assert max(rates[step] for step in range(25, 31)) <= 1e-4
    manifest = checkpoints(run)[-1].manifest
    assert (manifest["step"], manifest["sequences"], manifest["world_size"]) == (30, 24 * 8 + 6 * 4, 1)


def test_resume_after_ctrl_c_continues_bit_for_bit(uninterrupted: Path, tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "interrupted"
    arguments = [*TINY, "model.dropout=0.1", "train.steps=24", f"run_dir={run}", f"data.cache_dir={data_cache}"]
    # Slow enough to be stopped in the middle: evaluating after every step changes nothing that is learned.
    process = Running("train", *arguments, "train.eval_every=1", "train.eval_batches=32")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == 0, output
    assert "to continue: bigtrain train" in output
    stopped = result(run)
    assert stopped["status"] == "stopped"
    assert 3 <= stopped["train/steps"] < 24, "stopped too late to prove anything"

    bigtrain("train", *arguments)
    assert result(run)["status"] == "finished"
    assert losses(run) == losses(uninterrupted)
    whole, continued = (read_weights(max((path / "checkpoints").iterdir())) for path in (uninterrupted, run))
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    assert result(run)["eval/loss"] == result(uninterrupted)["eval/loss"]


def test_first_step_comes_soon(uninterrupted: Path, tmp_path: Path, data_cache: Path) -> None:
    """Within 15 s of the command; on a slow or busy machine, within what it takes to import DeepSpeed four times."""
    taken = []
    for attempt in range(3):
        run = tmp_path / str(attempt)
        started = time.time()
        bigtrain("train", *TINY, "train.steps=1", f"run_dir={run}", f"data.cache_dir={data_cache}")
        seconds = metrics(run)[0]["time"] - started
        began = time.time()
        subprocess.run([sys.executable, "-c", "import torch, deepspeed"], check=True, capture_output=True)
        taken.append((seconds, time.time() - began))
        if seconds < max(15, 4 * taken[-1][1]):
            return
    pytest.fail(f"(first step, import of DeepSpeed) took {taken} s")


def test_init_from_starts_with_the_other_runs_weights(uninterrupted: Path, tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "transfer"
    bigtrain(
        "train", *TINY, "train.steps=1", "engine=zero3", f"init_from={uninterrupted}",
        f"run_dir={run}", f"data.cache_dir={data_cache}",
    )  # fmt: skip
    assert losses(run)[1] == pytest.approx(losses(uninterrupted)[24], rel=0.05)


def test_more_steps_extend_a_finished_run(uninterrupted: Path, data_cache: Path) -> None:
    arguments = [*TINY, "model.dropout=0.1", f"run_dir={uninterrupted}", f"data.cache_dir={data_cache}"]
    assert "is finished at step 24" in bigtrain("train", *arguments, "train.steps=24")
    bigtrain("train", *arguments, "train.steps=26")
    assert result(uninterrupted)["train/steps"] == 26
