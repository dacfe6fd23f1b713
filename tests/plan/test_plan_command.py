"""`bigtrain plan` as it is typed: fast, without torch, the same config as train, one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from bigtrain import cli
from tests.models.test_presets import PUBLISHED


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli._run(["plan", "output=json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli._run(["plan", *arguments]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.count("\n") == 1
    return error


def test_it_answers_without_torch() -> None:
    code = (
        "import sys; from bigtrain import cli; "
        "status = cli._run(['plan', 'model=llama_405b', 'engine=zero3', 'cluster=h100x16384', "
        "'train.global_batch=16384', 'train.activation_checkpointing=true']); "
        "assert not status; assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "405,853,388,800" in done.stdout


def test_json_has_every_number_that_was_promised(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "model=llama_7b", "engine=zero3", "cluster=h100x8", "train.global_batch=64")
    for key in ("step_seconds", "tokens_per_second", "mfu", "hfu", "hours", "cost", "energy_kwh", "checkpoint_gib"):
        assert found[key] > 0, key
    assert found["parameters"] == PUBLISHED["llama_7b"] == sum(found["parameters_by_part"].values())
    parts = {name: gib for name, gib in found["memory"].items() if name != "peak"}
    assert found["memory"]["peak"] == pytest.approx(sum(parts.values()))
    assert found["fits"] is (found["memory"]["peak"] <= found["device_memory_gib"])
    assert "lines" not in found


def test_every_number_of_the_memory_names_formula_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "model=gpt2_124m", "cluster=a100_80gbx2", "explain=true")
    lines = {line["name"]: line for line in found["lines"]}
    wanted = {f"memory.{name}" for name in found["memory"]} | {"mfu", "hfu", "step_seconds", "cost", "energy_kwh"}
    assert wanted <= set(lines)
    assert all(lines[name]["formula"] for name in wanted)


def test_zero_shares_out_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The ZeRO paper's table 1 (arXiv 1910.02054) in its own setting: 16 bits, Adam, 12 bytes of states."""
    keys = ["model=gpt2_124m", "cluster=a100_80gbx64", "train.global_batch=64", "train.micro_batch=1"]
    parameters = PUBLISHED["gpt2_124m"]
    for stage in range(4):
        found = plan(capsys, *keys, f"engine=zero{stage}")["memory"]
        held = (found["parameters"] + found["master"] + found["optimizer"]) * 2**30
        share = 64 if stage else 1
        weights = 2 * parameters / (64 if stage == 3 else 1)
        assert held == pytest.approx(weights + 12 * parameters / share, rel=1e-3)


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["model=llama_7b", "cluster=a100_40gbx8", "train.global_batch=8"]
    assert cli._run(["plan", *keys, "engine=zero0"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    overrides = out.split("the nearest that fits: ")[1].split(" (")[0].split()
    assert plan(capsys, *keys, "engine=zero0", *overrides)["fits"]
    assert not plan(capsys, *keys, "engine=zero0")["fits"]


WRONG = [
    (["clustr=h100"], "clustr: unknown key; did you mean cluster?"),
    (["cluster=h1000"], "cluster='h1000': unknown; did you mean h100?"),
    (["cluster=h100x8", "train.global_batch=12"], "train.global_batch=12: not divisible by the number of ranks, 8"),
    (["train.stepz=3"], "train.stepz: unknown key; did you mean train.steps?"),
    (["tokens=0"], "tokens=0.0: must be above 0"),
    (["budget=0"], "budget=0.0: must be above 0"),
    (["tokens=many"], "tokens='many': wrong type"),
    (["goal=fast"], "goal='fast': not a valid choice; one of none, time, cost, memory"),
    (["explain=perhaps"], "explain='perhaps': wrong type, true or false is wanted"),
    (["model.dim=100", "model.n_heads=7"], "model.dim=100: not divisible by model.n_heads=7"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_wrong_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


def test_train_does_not_know_the_plans_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["train", "cluster=h100"]) == 2
    assert "only bigtrain plan takes it" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_the_real_engine_on_tensors_without_memory_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model=gpt_mini", "engine=zero2", "engine.bucket_mib=1", "cluster=h100x4", "train.global_batch=16"]
    assert cli._run(["plan", *small, "verify=true"]) == 0
    out = capsys.readouterr().out
    assert "an optimizer step was made" in out
    rows = [line.split() for line in out.split("verify:")[1].splitlines()]
    errors = {row[0]: float(row[-1].rstrip("%")) for row in rows if row and row[-1].endswith("%")}
    assert {"parameters", "master", "optimizer", "loss", "peak"} <= set(errors)
    assert abs(errors["peak"]) <= 3
    assert max(abs(errors[part]) for part in ("parameters", "master", "optimizer")) <= 0.1
