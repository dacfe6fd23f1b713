"""`bigtrain plan` as it is typed: fast, without torch, the same config as train, one line for what is wrong."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtrain import cli
from bigtrain.config import from_dict
from bigtrain.plan import sizes, table
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
    before = children_cpu_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "405,853,388,800" in done.stdout
    # 0.9 s of CPU, interpreter and imports included, on a core of a 2-core cloud machine; torch takes 1.6 more.
    assert children_cpu_seconds() - before < 2.2


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_json_has_every_number_that_was_promised(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "model=llama_7b", "engine=zero3", "cluster=h100x8", "train.global_batch=64")
    for key in ("step_seconds", "tokens_per_second", "mfu", "hfu", "hours", "cost", "energy_kwh", "checkpoint_gib"):
        assert found[key] > 0, key
    assert found["parameters"] == PUBLISHED["llama_7b"] == sum(found["parameters_by_part"].values())
    parts = {name: gib for name, gib in found["memory"].items() if name != "peak"}
    assert found["memory"]["peak"] == pytest.approx(sum(parts.values()))
    assert found["fits"] is (found["memory"]["peak"] <= found["device_memory_gib"])
    assert "lines" not in found


RESTATED = {"micro_batch", "accumulation", "ranks", "device_memory_gib"}  # of the config and the cluster


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a plan's JSON and its dotted name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for key, item in zip(("low", "high"), value, strict=True):
            yield from numbers(item, f"{name}.{key}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


EXPLAINED = {
    **{f"zero{stage} on GPUs": [f"engine=zero{stage}", "cluster=a100_80gbx2"] for stage in range(4)},
    **{f"zero{stage} on CPUs": [f"engine=zero{stage}", "cluster=laptop"] for stage in range(4)},
    "accelerate on GPUs": ["engine=accelerate", "cluster=a100_80gbx2"],
    "accelerate on CPUs": ["engine=accelerate", "cluster=laptop"],
    "fsdp2 on GPUs": ["engine=accelerate", "engine.parallel=fsdp2", "cluster=a100_80gbx2"],
    "offload on GPUs": ["engine=zero3", "engine.offload_optimizer=cpu", "cluster=a100_80gbx2", "tokens=1e9"],
    "frozen": ["train.freeze=[blocks.*]", "cluster=a100_80gbx2"],
}


@pytest.mark.parametrize("overrides", EXPLAINED.values(), ids=EXPLAINED)
def test_every_number_names_its_formula_and_source(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "model=gpt2_124m", "explain=true", *overrides)
    lines = {line["name"]: line for line in found.pop("lines")}
    found = {name: value for name, value in found.items() if name not in RESTATED | {"warnings"}}
    assert {"host_memory_gib", "intervals.memory.peak.low"} <= {name for name, _ in numbers(found)}
    for name, value in numbers(found):
        assert name in lines, name
        assert lines[name]["value"] == value, name
        assert lines[name]["formula"], name
        assert lines[name]["source"], name


def formula(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> dict[str, Any]:
    found = plan(capsys, "model=gpt2_124m", "explain=true", *arguments)
    (line,) = (line for line in found["lines"] if line["name"] == name)
    return dict(line)


def test_formulas_are_those_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    parameters, gib = PUBLISHED["gpt2_124m"], 2**30
    sharded = ["engine=accelerate", "engine.parallel=fsdp2", "cluster=a100_80gbx2"]
    line = formula(capsys, "memory.parameters", *sharded)
    assert (line["formula"], line["value"]) == ("4 P / N", pytest.approx(4 * parameters / 2 / gib, rel=1e-4))
    line = formula(capsys, "memory.parameters", "engine=accelerate", "cluster=a100_80gbx2")
    assert (line["formula"], line["value"]) == ("4 P", pytest.approx(4 * parameters / gib))
    line = formula(capsys, "memory.parameters", "engine=zero3", "cluster=a100_80gbx2")
    assert (line["formula"], line["value"]) == ("2 P / N, padded", pytest.approx(2 * parameters / 2 / gib, rel=1e-4))
    line = formula(capsys, "memory.optimizer", "engine=zero1", "cluster=a100_80gbx2")
    assert (line["formula"], line["value"]) == ("8 P / N, padded", pytest.approx(8 * parameters / 2 / gib, rel=1e-4))


def test_the_price_says_where_it_is_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert formula(capsys, "cost", "cluster=h100")["source"].startswith("Lambda, on demand, 8 H100 SXM, 2025")
    preset = Path(__file__).parents[2] / "conf" / "cluster" / "h100.yaml"
    (tmp_path / "ours.yaml").write_text(preset.read_text().split("source:")[0])
    assert "ours, whose file names no source" in formula(capsys, "cost", f"cluster={tmp_path / 'ours.yaml'}")["source"]


# -------------------------------------------------------------------------------------- what was not validated


def memory_width(found: dict[str, Any]) -> float:
    """Without what libraries widen it by on a CPU."""
    (low, high), peak = found["intervals"]["memory.peak"], found["memory"]["peak"]
    assert low < peak < high
    libraries = [note for note in found["warnings"] if "libraries" in note]
    widened = bool(libraries) * 0.75 * found["memory"]["context"] + found["memory"].get("kernels", 0)
    return float(high / peak - 1 - widened / peak)


def test_the_peak_has_an_interval_and_the_table_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    on_cpu = plan(capsys, "model=gpt_mini", "cluster=laptop")
    tensors = 0.03  # what benchmarks/plan_accuracy.py stays below
    assert memory_width(on_cpu) == pytest.approx(tensors)
    assert any("libraries" in note for note in on_cpu["warnings"])
    large = plan(capsys, "model=llama_7b", "cluster=laptop")
    assert memory_width(large) == pytest.approx(tensors)
    assert not any("libraries" in note for note in large["warnings"])
    assert memory_width(plan(capsys, "model=gpt_mini", "cluster=h100")) > 0.1
    assert cli._run(["plan", "model=gpt_mini", "cluster=laptop"]) == 0
    low, high = on_cpu["intervals"]["memory.peak"]
    assert f"{table.size(low)} to {table.size(high)}" in capsys.readouterr().out


SST2 = ["model=bert_tiny", "task=classification"]
PRESENT = "libraries|lengths of examples"  # on any CPU
UNVALIDATED = {
    "quantize": ["compress=qat_int8"],
    "prune": ["compress=prune_global"],
    "optimizer=muon": ["optimizer=muon"],
    "adversarial": [*SST2, "task.adversarial=fgm"],
    "unpadded": [*SST2, "model.unpadded=true"],
    "engine=accelerate": ["engine=accelerate"],
}


@pytest.mark.parametrize(("said", "overrides"), UNVALIDATED.items(), ids=UNVALIDATED)
def test_memory_outside_of_what_was_validated(
    said: str, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(capsys, "model=gpt_mini", "cluster=laptop", *overrides)
    (note,) = (line for line in found["warnings"] if line.startswith("memory: ") and not re.search(PRESENT, line))
    assert said in note
    assert note.endswith(f"interval +{memory_width(found) - 0.03:.0%}")


def test_a_teacher_is_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = {"kind": "decoder", "dim": 512, "n_layers": 6, "n_heads": 8, "vocab_size": 4096, "max_seq_len": 512}
    teacher = sizes.of_run(from_dict({"model": shape})).total
    (tmp_path / "config.yaml").write_text(json.dumps({"model": shape}))
    student = ["model=gpt_mini", "model.vocab_size=4096", "cluster=h100x2", "engine=zero3"]
    alone = plan(capsys, *student)
    distil = [*student, "compress=distil", f"compress.distil.teacher={tmp_path}"]
    taught = plan(capsys, *distil)
    assert "teacher" not in alone["memory"]
    assert taught["memory"]["teacher"] == pytest.approx(2 * teacher / 2**30)
    assert taught["memory"]["peak"] == pytest.approx(alone["memory"]["peak"] + taught["memory"]["teacher"])
    sharded = plan(capsys, *distil, "compress.distil.teacher_sharded=true")
    assert sharded["memory"]["teacher"] == pytest.approx(teacher / 2**30, rel=1e-3)
    assert taught["step_seconds"] == pytest.approx(alone["step_seconds"] + taught["time"]["teacher"])
    assert taught["time"]["teacher"] > alone["time"]["forward"]
    assert taught["tokens_per_second"] * taught["step_seconds"] == pytest.approx(taught["tokens_per_step"])
    simulated = plan(capsys, *distil, "simulate=true", "jitter=0")["simulation"]["step"]
    untaught = plan(capsys, *student, "simulate=true", "jitter=0")["simulation"]["step"]
    assert simulated["seconds"] == pytest.approx(untaught["seconds"] + taught["time"]["teacher"])
    assert simulated["exposed_communication_seconds"] == pytest.approx(untaught["exposed_communication_seconds"])
    assert {line["name"] for line in plan(capsys, *distil, "explain=true")["lines"]} >= {
        "memory.teacher",
        "time.teacher",
    }

    (tmp_path / "config.yaml").unlink()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    unknown = plan(capsys, *distil)
    assert "teacher" not in unknown["memory"]
    assert memory_width(unknown) > 1
    assert sum("the teacher is no run" in line or "it is no run" in line for line in unknown["warnings"]) == 2


def test_a_tokenizer_that_is_not_here_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = ["model=gpt_mini", "cluster=laptop"]
    unknown = plan(capsys, *keys, "data.tokenizer.path=org/model")
    assert any("a vocabulary of 4,096 is taken" in line for line in unknown["warnings"])
    assert not any("tokenizer" in line for line in plan(capsys, *keys)["warnings"])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 31999}}, "added_tokens": []}))
    found = plan(capsys, *keys, f"data.tokenizer.path={tmp_path}")
    assert found["parameters"] - unknown["parameters"] == (32000 - 4096) * 256
    assert not any("tokenizer" in line for line in found["warnings"])


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


LLAMA = ["model=llama_20m"]
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
    (["model.rope_scaling={kind:linear,factor:4}"], "model.rope_scaling='linear': model.positions=learned"),
    ([*LLAMA, "model.rope_scaling={kind:linear,factor:0.5}"], "model.rope_scaling.factor=0.5: must be 1 or more"),
    ([*LLAMA, "model.rope_scaling={kind:llama3,high_freq_factor:1}"], "model.rope_scaling.low_freq_factor=1.0: must"),
    ([*LLAMA, "model.rope_scaling={kind:yarn}"], "model.rope_scaling.kind='yarn': unknown; one of linear, llama3"),
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
