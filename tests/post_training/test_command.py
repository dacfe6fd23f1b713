"""`bigtrain compress`: recipes on a run and on a Hugging Face directory, and what they leave behind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bigtrain import cli, evaluate, generate
from bigtrain import config as schema
from bigtrain.checkpoint import newest
from bigtrain.checkpoint.weights import iterate_weights, read_weights
from bigtrain.compress.quantize import PTQ, rounded
from bigtrain.errors import ConfigError
from bigtrain.export import export
from bigtrain.models.stored import StoredTensors
from bigtrain.post_training import command, model_directory, recipe, timer
from bigtrain.post_training.command import Options
from bigtrain.post_training.page import SIZE_COLUMNS, TIME_COLUMNS
from bigtrain.post_training.recipe import parse
from bigtrain.post_training.structure import Cut
from bigtrain.tasks.causal_lm import CausalLM
from tests.runs import bigtrain

QUICK = Options(calibration_batches=1, watts=20.0)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def little() -> Iterator[None]:
    """Everything is measured on a little of the held-out text."""
    held_out = CausalLM.held_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLM, "held_out", lambda self, share, most=None: held_out(self, share, min(most or 3, 3)))
        patch.setattr(timer, "ROUND_SECONDS", 0.0)
        patch.setattr(timer, "BATCHES", 1)
        yield


@pytest.fixture(scope="module")
def source(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with weights in bfloat16, as runs of that precision have them."""
    weights = iterate_weights(newest(trained_run))  # type: ignore[arg-type]
    halved = ((name, tensor.bfloat16()) for name, tensor in weights)
    config = schema.load(trained_run / "config.yaml")
    out = tmp_path_factory.mktemp("source") / "run"
    return model_directory.write(out, config, config.model, halved, trained_run / "tokenizer", None)


@pytest.fixture(scope="module")
def compressed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    recipes = ["magnitude=0.5", "wanda=0.25+int8", "int4", "int8_dynamic", "heads=1+neurons=0.5+layers=1"]
    command.run(source, recipes, out, QUICK, quiet)
    return out


def rows(out: Path) -> dict[str, dict]:
    return {row["recipe"]: row for row in json.loads((out / "compress.json").read_text())["rows"]}


def test_the_numbers_are_those_of_the_models(compressed: Path, source: Path) -> None:
    found = rows(compressed)
    dense, half, cut = found["dense"], found["magnitude=0.5"], found["heads=1+neurons=0.5+layers=1"]
    weights = read_weights(newest(source))  # type: ignore[arg-type]
    assert dense["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert dense["disk_bytes"] == (newest(source) / "model.safetensors").stat().st_size  # type: ignore[operator]
    assert half["disk_bytes"] == pytest.approx(dense["disk_bytes"], rel=0.01)  # zeros are not packed
    matrices = {name for name in weights if name.startswith("blocks.") and weights[name].dim() == 2}
    kept = read_weights(newest(compressed / "magnitude-0.5"))  # type: ignore[arg-type]
    pruned = sum(int((kept[name] == 0).sum()) for name in matrices)
    assert pruned == round(0.5 * sum(weights[name].numel() for name in matrices))  # exactly
    assert half["nonzeros"] == half["parameters"] - sum(int((tensor == 0).sum()) for tensor in kept.values())
    assert cut["parameters"] < 0.7 * dense["parameters"]
    assert cut["disk_bytes"] < 0.7 * dense["disk_bytes"]
    for row in found.values():
        assert row["metrics"]["eval/loss"] > 0
        assert row["batch_32_joules"] == pytest.approx(20.0 * row["batch_32_seconds"])
        assert row["batch_1_watts_source"] == "--watts"
        assert row["batch_32_seconds_q1"] <= row["batch_32_seconds"] <= row["batch_32_seconds_q3"]
        assert row["batch_1_joules_q3"] == pytest.approx(20.0 * row["batch_1_seconds_q3"])
        assert row["batch_1_repeats"] >= timer.ROUNDS
    page = (compressed / "index.html").read_text()
    assert all(name in page for name in found)
    assert (compressed / "quality_size.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("recipe", "dtype", "bits"),
    [("int8_dynamic", torch.int8, 8), ("int4", torch.uint8, 4.5), ("wanda=0.25+int8", torch.int8, 8)],
)
def test_what_is_called_int_is_integers_on_the_disk(
    recipe: str, dtype: torch.dtype, bits: float, compressed: Path, source: Path
) -> None:
    """And what is said of it is of that file, and what every command reads of it is the same model."""
    folder = compressed / parse(recipe).folder
    checkpoint = newest(folder)
    assert checkpoint is not None
    raw = load_file(checkpoint / "model.safetensors")
    dense = read_weights(newest(source))  # type: ignore[arg-type]
    matrices = {name for name, tensor in dense.items() if name.startswith("blocks.") and tensor.dim() == 2}
    assert {name for name, tensor in raw.items() if tensor.dtype == dtype} == matrices
    row, first = rows(compressed)[recipe], rows(compressed)["dense"]
    assert Path(row["directory"]) == folder
    assert row["disk_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    saved = first["disk_bytes"] - row["disk_bytes"]
    numbers = sum(dense[name].numel() for name in matrices)
    assert saved == pytest.approx(numbers * (16 - bits) / 8, rel=0.05)
    assert row["bits"] == pytest.approx(8 * row["disk_bytes"] / row["parameters"])
    read = read_weights(checkpoint)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in read.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in dense.items()
    }
    assert row["nonzeros"] == sum(int(tensor.count_nonzero()) for tensor in read.values()) < row["parameters"]
    if "=" not in recipe:
        scheme = PTQ[recipe]
        for name in matrices:
            assert torch.equal(read[name], rounded(dense[name], None, scheme)), name
    metrics, _ = evaluate.run(folder, data=[], columns={})
    assert metrics["eval/loss"] == pytest.approx(row["metrics"]["eval/loss"], rel=1e-5)
    assert metrics["eval/loss"] != first["metrics"]["eval/loss"]
    assert generate.run(folder, ["def"], max_new_tokens=2)[0].startswith("def")
    with pytest.raises(ConfigError, match="has quantized weights already"):
        command.run(folder, ["int8"], compressed / "again", QUICK, quiet)


def test_export_of_integers_says_what_it_writes(compressed: Path, tmp_path: Path) -> None:
    run = compressed / "int8_dynamic"
    said: list[str] = []
    out = export(run, tmp_path / "hf", say=said.append)
    assert said[0].startswith(
        "RUN computes with int8 weights in 8 layers. Format huggingface holds no integers: they are"
    )
    assert (
        f"written as bfloat16, rounded to the same values, {(out / 'model.safetensors').stat().st_size / 1e6:.2f} MB"
        in said[0]
    )
    said.clear()
    export(compressed / "magnitude-0.5", tmp_path / "dense", say=said.append)
    assert not said


def test_no_step_on_the_way_is_left_under_anothers_name(compressed: Path) -> None:
    assert sorted(path.name for path in compressed.iterdir() if path.is_dir()) == [
        "heads-1+neurons-0.5+layers-1", "int4", "int8_dynamic", "magnitude-0.5", "wanda-0.25+int8",
    ]  # fmt: skip


def test_the_tables_say_what_is_removed_and_what_is_spread(compressed: Path, source: Path, tmp_path: Path) -> None:
    found = rows(compressed)
    assert found["heads=1+neurons=0.5+layers=1"]["removed"] == "1 of 2 heads, 128 of 256 neurons, 1 of 2 layers"
    assert found["wanda=0.25+int8"]["removed"] == "25% of weights (to 0)"
    lines = command.table(SIZE_COLUMNS, list(found.values())).splitlines()
    assert lines[0].split() == [
        "recipe", "parameters", "non-zero", "MB", "bits", "each", "loss", "perplexity", "removed",
    ]  # fmt: skip
    assert lines[-1].endswith("  1 of 2 heads, 128 of 256 neurons, 1 of 2 layers")
    (cell,) = re.findall(r"\d \(.*?\)", command.table(TIME_COLUMNS, [found["dense"]], head=False))[:1]
    assert " to " in cell
    help = CliRunner().invoke(cli.command, ["compress", "--help"]).output
    assert "how much is removed" in " ".join(help.split())


def test_what_a_cut_leaves_is_a_model_for_every_command(compressed: Path, tmp_path: Path) -> None:
    """Evaluated alike, exported, read by transformers, and cut again from there."""
    import transformers

    smaller = compressed / "heads-1+neurons-0.5+layers-1"
    config = schema.load(smaller / "config.yaml").model
    assert (config.n_layers, config.n_heads, config.head_dim, config.ffn_dim) == (1, 1, 32, 128)  # type: ignore[union-attr]
    out = export(smaller, tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    again = command.run(out, ["neurons=0.5"], tmp_path / "again", QUICK, quiet)
    dense = again["rows"][0]
    assert dense["parameters"] == loaded.num_parameters()
    assert dense["metrics"]["eval/loss"] == pytest.approx(
        rows(compressed)["heads=1+neurons=0.5+layers=1"]["metrics"]["eval/loss"], rel=0.05
    )  # other held-out text: another cut of the corpus


@pytest.mark.soak
def test_training_goes_on_with_zeros_held_and_a_teacher(trained_run: Path, tmp_path: Path) -> None:
    said = bigtrain(
        "compress", str(trained_run), "magnitude=0.5+int8", "layers=1", "--recover-steps", "4", "--distil",
        "--lr", "1e-3", "--out", str(tmp_path / "out"), "--calibration-batches", "1",
    )  # fmt: skip
    found = rows(tmp_path / "out")
    assert len(found) == 3
    assert str(tmp_path / "out" / "index.html") in said
    recovered = read_weights(newest(tmp_path / "out" / "magnitude-0.5-recovered"))  # type: ignore[arg-type]
    start = read_weights(newest(tmp_path / "out" / "magnitude-0.5"))  # type: ignore[arg-type]
    integers = StoredTensors(newest(tmp_path / "out" / "magnitude-0.5-recovered+int8"))  # type: ignore[arg-type]
    assert integers.quantized == {name for name in start if name.startswith("blocks.") and start[name].dim() == 2}
    changed = 0
    for name, tensor in start.items():
        if name.startswith("blocks.") and tensor.dim() == 2:
            assert torch.equal(tensor == 0, recovered[name] == 0), name
            changed += int((tensor != recovered[name]).sum())
    assert changed
    run = schema.load(tmp_path / "out" / "layers-1-recovered" / "config.yaml")
    assert run.model.n_layers == 1  # type: ignore[union-attr]
    assert run.compress.distil is not None


def test_recipes_as_they_are_typed() -> None:
    found = parse("heads=0.25+neurons=12+wanda=0.5+int4")
    assert found.cut == Cut(heads=0.25, neurons=12)
    assert found.prune is not None
    assert (found.prune.method, found.prune.sparsity, found.prune.scope) == ("wanda", 0.5, "layer")
    assert found.quantize == "int4"
    assert parse("nm=4:8").prune.pattern == "4:8"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hads=1", "'hads=1' is no step; did you mean heads?"),
        (
            "smaller",
            f"'smaller' is no step; steps are {recipe.EXAMPLES} (a number says how much is removed), joined by +",
        ),
        ("heads=few", "heads=few is no number"),
        ("magnitude=1", "magnitude=1: sparsity must be at least 0 and below 1"),
        ("magnitude=0.5+wanda=0.5", "has prune twice"),
        ("nm=4:2", "nm=4:2 is no pattern; write it as nm=2:4"),
    ],
)
def test_what_is_no_recipe(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value) == f"RECIPE={text!r}: {message}"


def test_refusals_leave_nothing_behind(trained_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        ((str(trained_run), "heads=2"), "heads='2': there are 2, and one must stay; take at most 1"),
        ((str(tmp_path), "heads=1"), "is no run (config.yaml) and no Hugging Face directory"),
        ((str(trained_run), "int8", "int8"), "names one twice"),
        ((str(trained_run), "nm=3:5"), "not divisible by 5"),
        ((str(trained_run), "neurons=1+int4"), "down has 255 inputs, and 32 of them share a scale; take int8, or cut"),
        ((str(trained_run), "neurons=0.1+nm=2:4"), "down has 231 inputs, not divisible by 4"),
    ):
        with pytest.raises(ConfigError) as caught:
            command.run(Path(arguments[0]), arguments[1:], out, QUICK, quiet)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not out.exists()
