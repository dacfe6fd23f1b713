"""Recommendations are the best of what was searched, fit, and are settings that `train` takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bigtrain import compose
from bigtrain.checks import check, check_batch
from bigtrain.config import AdafactorConfig, Config, DecoderConfig, DeepSpeedConfig, TrainConfig
from bigtrain.errors import ConfigError
from bigtrain.launch.train import checked
from bigtrain.plan import clusters, command, recommend
from bigtrain.plan.options import Options, split

LLAMA = DecoderConfig(
    dim=4096, n_layers=32, n_heads=32, ffn_dim=11008, vocab_size=32000, max_seq_len=4096, positions="rotary",
    norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False,
)  # fmt: skip
CONFIG = Config(model=LLAMA, engine=DeepSpeedConfig(stage=3), train=TrainConfig(global_batch=512))
H100 = clusters.find("h100x32")
TOKENS = 1e11


@pytest.fixture(scope="module")
def found() -> dict[str, recommend.Recommendation]:
    return {goal: recommend.search(CONFIG, H100, goal, TOKENS) for goal in recommend.GOALS}


def test_each_goal_is_reached(found: dict[str, recommend.Recommendation]) -> None:
    by_time, by_cost, by_memory = (found[goal].best for goal in ("time", "cost", "memory"))
    assert by_time.bill.hours < min(by_cost.bill.hours, by_memory.bill.hours)
    assert by_cost.bill.cost < min(by_time.bill.cost, by_memory.bill.cost)
    assert by_memory.peak_gib < min(by_time.peak_gib, by_cost.peak_gib)
    assert by_time.ranks == 32
    # Least memory: everything sharded, recomputed and on the host, one sequence at a time.
    engine = by_memory.config.engine
    assert isinstance(engine, DeepSpeedConfig)
    assert (engine.stage, engine.offload_optimizer, engine.offload_parameters) == (3, "cpu", "cpu")
    assert by_memory.config.train.activation_checkpointing
    assert by_memory.config.train.micro_batch == 1


def test_everything_recommended_fits_and_is_valid(found: dict[str, recommend.Recommendation]) -> None:
    for recommendation in found.values():
        for each in [recommendation.best, *recommendation.front]:
            assert each.room.fits
            check(each.config)
            check_batch(each.config, each.ranks)
            assert each.config.train.global_batch == 512  # what is learned is not changed


def test_nothing_on_the_front_is_beaten(found: dict[str, recommend.Recommendation]) -> None:
    front = found["time"].front
    numbers = [(each.bill.hours, each.bill.device_hours, each.peak_gib) for each in front]
    assert len(front) > 5
    for one in numbers:
        assert not any(all(a <= b for a, b in zip(other, one, strict=True)) and other != one for other in numbers)
    hours = [each.bill.hours for each in front]
    assert hours == sorted(hours)
    for goal in recommend.GOALS:
        best = found[goal].best
        assert any(each.line == best.line and each.ranks == best.ranks for each in front), goal


def test_the_next_change_is_a_larger_cluster_that_helps(found: dict[str, recommend.Recommendation]) -> None:
    change = found["time"].next_change
    assert change.startswith("64 devices instead of 32")  # 40 do not divide 512 sequences
    assert "accumulation" in change


def test_no_more_devices_than_sequences_help() -> None:
    small = replace(CONFIG, train=replace(CONFIG.train, global_batch=32))
    assert "train.global_batch=32" in recommend.search(small, H100, "time", TOKENS).next_change


def test_what_binds_is_named(found: dict[str, recommend.Recommendation]) -> None:
    assert "device memory" in found["time"].binds
    slow = replace(H100, inter_node_gb_per_second=0.05)
    assert "communication" in recommend.search(CONFIG, slow, "time", TOKENS).binds or (
        recommend.search(CONFIG, slow, "time", TOKENS).best.ranks <= 8  # stays inside of a node
    )


def test_overrides_and_yaml_are_what_train_takes(
    found: dict[str, recommend.Recommendation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = found["memory"].best
    composed: list[Config] = []

    def keep(job: compose.Job) -> float:
        composed.append(checked(job.data))
        return 0.0

    compose.run(["model=llama_7b", *best.line.split()], keep)
    settings = yaml.safe_load(best.yaml)
    assert best.yaml.startswith("# @package _global_\n")
    flat = [f"{part}.{key}={value}" for part, items in settings.items() for key, value in items.items()]
    compose.run(["model=llama_7b", *flat], keep)
    for config in composed:
        assert config.engine == best.config.engine
        for name in ("global_batch", "micro_batch", "activation_checkpointing", "steps"):
            assert getattr(config.train, name) == getattr(best.config.train, name)
        assert config.launch.ranks == 8
        check_batch(config, best.ranks)


def test_what_an_optimizer_cannot_do_is_not_recommended() -> None:
    """Adafactor runs at stage 0 only."""
    config = Config(
        model=DecoderConfig(vocab_size=4096), engine=DeepSpeedConfig(stage=0), optimizer=AdafactorConfig(),
        train=TrainConfig(global_batch=32),
    )  # fmt: skip
    front = recommend.search(config, clusters.find("h100x8"), "time", 1e9).front
    assert {each.overrides["engine.stage"] for each in front} == {0}


def test_nothing_fits() -> None:
    config = Config(model=replace(LLAMA, dim=16384, n_layers=126, n_heads=128), train=TrainConfig(global_batch=8))
    with pytest.raises(ConfigError, match=r"nothing fits: the least is \d+% of the (host|device) memory"):
        recommend.search(config, clusters.find("a100_40gbx2"), "time", 1e9)


@pytest.mark.parametrize("tokens", [0.0, -5.0])
def test_no_tokens(tokens: float) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        recommend.search(CONFIG, H100, "time", tokens)


# ------------------------------------------------------------------------------------------ the command


def plan(*arguments: str) -> str:
    """What `bigtrain plan` prints, in this process."""
    options, overrides = split(list(arguments))
    said: list[str] = []

    def job(found: compose.Job) -> float:
        return command.run(found.data, options, said.append)

    compose.run(overrides, job)
    return "\n".join(said)


BILLION = ["model=llama_1b", "engine=zero3", "train.global_batch=64"]


def test_the_command_recommends(tmp_path: Path) -> None:
    found = json.loads(plan(*BILLION, "cluster=a100_80gbx8", "goal=cost", "tokens=2e10", "output=json"))
    best = found["recommendation"]
    assert best["goal"] == "cost"
    assert found["fits"]
    assert found["ranks"] == best["ranks"]
    assert found["hours"] == pytest.approx(best["hours"], rel=0.01)
    assert found["memory"]["peak"] == pytest.approx(best["peak_gib"])
    assert best["binds"]
    text = plan(*BILLION, "cluster=a100_80gbx8", "goal=cost", "tokens=2e10")
    assert f"train with: {best['overrides']}" in text


def test_the_command_answers_backwards(tmp_path: Path) -> None:
    ladder = tmp_path / "ladder.json"
    ladder.write_text(json.dumps({"E": 1.5, "A": 400.0, "a": 0.34, "B": 1800.0, "b": 0.36}))
    arguments = [*BILLION, "cluster=a100_80gbx8", "budget=5000", "target_loss=2.6", f"ladder={ladder}"]
    found = json.loads(plan(*arguments, "output=json"))
    assert found["purchase"]["cost"] == pytest.approx(5000)
    assert found["purchase"]["parameters_interval"][0] < found["purchase"]["parameters"]
    assert found["target"]["fitted"] is True
    assert found["tokens"] == pytest.approx(found["target"]["tokens"])
    assert found["target"]["hours"] <= found["target"]["hours_with_failures"]
    text = plan(*arguments)
    assert "compute-optimal" in text
    assert "the largest of this shape that fits" in text
    with pytest.raises(ConfigError, match="budget of hours"):
        plan(*BILLION, "cluster=a100_80gbx8", "hours=10", "budget=10")


def test_the_page_stands_by_itself(tmp_path: Path) -> None:
    text = plan(*BILLION, "cluster=a100_80gbx16", "goal=time", "tokens=2e10", "report=true", f"out={tmp_path}/page")
    page = tmp_path / "page" / "plan.html"
    assert str(page) in text
    html = page.read_text()
    for picture in ("memory", "step", "scaling", "checkpoints", "timeline", "front"):
        assert f'<img id="{picture}"' in html
    assert "http" not in html.replace('http-equiv="', "")  # nothing is loaded from a network
    assert html.count("data:image/png;base64,") == 6
    assert Options().report is False


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    from bigtrain.errors import BigtrainError

    (tmp_path / "file").write_text("")
    with pytest.raises(BigtrainError, match="cannot be written"):
        plan(*BILLION, "cluster=a100_80gbx8", "report=true", f"out={tmp_path}/file/page")
