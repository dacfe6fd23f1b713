"""Recommendations are the best of what was searched, fit, and are settings that `train` takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain import compose
from bigtrain.checks import check, check_batch
from bigtrain.config import AdafactorConfig, Config, DecoderConfig, DeepSpeedConfig, LaunchConfig, TrainConfig
from bigtrain.errors import ConfigError
from bigtrain.launch.train import checked
from bigtrain.plan import clusters, command, planner, recommend, sizes
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


def composed(*arguments: str) -> Config:
    found: list[Config] = []

    def keep(job: compose.Job) -> float:
        found.append(sizes.with_vocabulary(checked(job.data)))
        return 0.0

    compose.run([*arguments, "run_dir=r"], keep)
    return found[0]


SECTIONS = ("model", "task", "data", "engine", "optimizer", "schedule", "train", "compress", "launch", "init_from")
RUNS = [
    ["model=llama_7b", "engine=zero3", "train.global_batch=512"],
    ["model=llama_1b", "launch=slurm", "train.global_batch=64", "launch.slurm.partition=gpus", "launch.nodes=9"],
    ["experiment=gpt2_124m", "engine=accelerate", "optimizer=lion", "data.path=a.txt"],
    ["experiment=bert_pretrain", "engine=zero_infinity", "engine.nvme_path=/swap", "train.global_batch=256"],
    ["experiment=llama_1b", "data.path=[a.txt,b.txt]", "compress=[prune_wanda,qat_int8]", "train.compile=false"],
]


@pytest.mark.parametrize("run", RUNS, ids=[run[0] for run in RUNS])
def test_the_line_and_the_yaml_alone_are_what_was_planned(run: list[str], tmp_path: Path) -> None:
    best = recommend.search(composed(*run), H100, "time", 1e10).best
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(best.yaml)
    for config in (composed(*run, *best.line.split()), composed("--config-dir", str(tmp_path), "experiment=mine")):
        for section in SECTIONS:
            assert getattr(config, section) == getattr(best.config, section), section
        check_batch(config, best.ranks)


def test_a_line_for_several_nodes_says_how_many(found: dict[str, recommend.Recommendation]) -> None:
    local = found["time"].best
    assert "launch.nodes" not in local.overrides  # launch=local is one machine
    assert local.to_add is not None
    assert "8 ranks on each of 4 nodes: launch=slurm launch.nodes=4" in local.to_add
    assert f"# {local.to_add}" in local.yaml
    slurm = recommend.search(replace(CONFIG, launch=LaunchConfig(kind="slurm")), H100, "time", TOKENS).best
    assert (slurm.overrides["launch.ranks"], slurm.overrides["launch.nodes"], slurm.to_add) == (8, 4, None)
    text = plan(*BILLION, "cluster=a100_80gbx16", "goal=time", "tokens=2e10")
    assert "  add what starts 8 ranks on each of 2 nodes" in text


def test_another_engine_is_named() -> None:
    run = ["model=llama_1b", "engine=accelerate", "train.global_batch=512"]
    best = recommend.search(composed(*run), H100, "time", 1e10).best
    assert best.line.startswith("engine=zero")
    found = planner.nearest_fit(composed(*run), H100)
    assert found is not None
    assert found[0][0].startswith("engine=zero")
    nearest = composed(*run, *found[0])
    assert isinstance(nearest.engine, DeepSpeedConfig)
    assert planner.make(nearest, H100).memory == found[1].memory


def test_the_warm_up_keeps_its_share() -> None:
    """What was written for a long run would be longer than a short one, which train refuses."""
    run = ["experiment=llama_7b", "data.path=a.txt"]
    best = recommend.search(composed(*run), H100, "time", 1e9).best
    assert best.config.train.steps == 239
    assert best.config.schedule.warmup_steps == 239 * 2000 // 33400
    check(best.config)


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
        return command.run(checked(found.data), options, said.append)

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


LADDER = {
    "E": 1.5, "A": 400.0, "a": 0.34, "B": 1800.0, "b": 0.36,
    "intervals": {"E": [1.4, 1.6], "A": [300, 500], "a": [0.3, 0.38], "B": [1000, 3000], "b": [0.33, 0.39]},
    "points": [{"parameters": 1e7 * size, "tokens": 2e8 * size} for size in (0.25, 1, 4)],
}  # fmt: skip


def test_the_command_answers_backwards(tmp_path: Path) -> None:
    ladder = tmp_path / "ladder.json"
    ladder.write_text(json.dumps(LADDER))
    arguments = [*BILLION, "cluster=a100_80gbx8", "budget=5000", "target_loss=2.6", f"ladder={ladder}"]
    found = json.loads(plan(*arguments, "output=json"))
    assert found["purchase"]["cost"] == pytest.approx(5000)
    assert found["purchase"]["parameters_interval"][0] < found["purchase"]["parameters"]
    assert found["target"]["fitted"] is True
    assert found["tokens"] == pytest.approx(found["target"]["tokens"])
    assert found["target"]["hours"] <= found["target"]["hours_with_failures"]
    for name in ("tokens", "hours", "cost"):
        low, high = found["target"][f"{name}_interval"]
        assert low < found["target"][name] < high
    text = plan(*arguments)
    assert "one standard error" in text
    assert "compute-optimal" in text
    assert "the largest of this shape that fits" in text
    with pytest.raises(ConfigError, match="budget of hours"):
        plan(*BILLION, "cluster=a100_80gbx8", "hours=10", "budget=10")
    ladder.write_text(json.dumps({name: LADDER[name] for name in ("E", "A", "a", "B", "b")}))
    found = json.loads(plan(*arguments, "output=json"))
    assert found["target"]["hours_interval"] is found["purchase"]["tokens_interval"] is None
    assert "the ladder holds no intervals" in plan(*arguments)


def test_models_that_are_bought_are_what_their_lines_make() -> None:
    """Heads of keys and values among them: 0.3B of the shape of 32 heads and 8."""
    run = [*BILLION, "cluster=h100x64"]
    found = json.loads(plan(*run, "budget=20", "output=json"))["purchase"]
    text = plan(*run, "budget=20")
    for name in ("overrides", "largest_overrides"):
        assert found[name] in text
        model = composed(*BILLION, *found[name].split()).model
        assert isinstance(model, DecoderConfig)
        assert model.n_heads == 4 * (model.n_kv_heads or 0)
    bought = composed(*BILLION, *found["largest_overrides"].split())
    assert sizes.of_run(bought).total == found["largest_parameters"]


@pytest.mark.parametrize("asked", ["budget=5000", "hours=5", "target_loss=2.5"])
@pytest.mark.parametrize(("batch", "cluster"), [(16, "h100x64"), (12, "h100x8")])
def test_a_batch_that_cannot_be_shared_out_is_said_first(asked: str, batch: int, cluster: str) -> None:
    with pytest.raises(ConfigError, match=rf"train.global_batch={batch}: not divisible by the number of ranks"):
        plan("model=llama_1b", f"cluster={cluster}", f"train.global_batch={batch}", asked)


def test_a_law_of_decoders_says_so_of_an_encoder(tmp_path: Path) -> None:
    bert = ["model=bert_base", "task=masked_lm", "cluster=h100x8", "train.global_batch=64", "target_loss=3"]
    assert "a law of decoders' causal loss: of an encoder's masked tokens it says little" in plan(*bert)
    ladder = tmp_path / "ladder.json"
    ladder.write_text(json.dumps(LADDER))
    assert "a law of decoders" not in plan(*bert, f"ladder={ladder}")
    assert "a law of decoders" not in plan(*BILLION, "cluster=h100x8", "target_loss=3")


def test_the_page_stands_by_itself(tmp_path: Path) -> None:
    text = plan(*BILLION, "cluster=a100_80gbx16", "goal=time", "tokens=2e10", "report=true", f"out={tmp_path}/page")
    page = tmp_path / "page" / "plan.html"
    assert str(page) in text
    html = page.read_text()
    for picture in ("memory", "step", "scaling", "checkpoints", "timeline", "front"):
        assert f'<img id="{picture}"' in html
    assert "http" not in html.replace('http-equiv="', "")  # nothing is loaded from a network
    assert html.count("data:image/png;base64,") == html.count("<img id=")
    assert Options().report is False


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    from bigtrain.errors import BigtrainError

    (tmp_path / "file").write_text("")
    with pytest.raises(BigtrainError, match="cannot be written"):
        plan(*BILLION, "cluster=a100_80gbx8", "report=true", f"out={tmp_path}/file/page")
