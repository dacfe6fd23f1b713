"""What is compared: how each part is reckoned today, kept in a file, and held to it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from bigtrain import cli, compose
from bigtrain import config as schema
from bigtrain.checkpoint import changes
from bigtrain.config import Config, from_dict
from bigtrain.launch import run_dir
from bigtrain.launch.train import checked, prepare_data
from tests.distributed.ranks import run_ranks
from tests.goldens.recipes import COMMON, CURVES, ENGINES, FOLDER, RECIPES, RUNS, Recipe, at_home

NUMBERS = FOLDER / "numbers"


# ------------------------------------------------------------------------------------------ --cfg job, the plan


def printed(*arguments: str) -> str:
    """What a command says, which must be all right."""
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        status = cli._run(list(arguments))
    assert status == 0, f"bigtrain {' '.join(arguments)}: {wrong.getvalue()}"
    return said.getvalue()


ABSENT = "(not there)"


def cfg() -> dict[str, Any]:
    """{experiment: what `--cfg job` prints}; of all but the default recipe what differs from that."""
    experiments = {name: [f"experiment={name}"] for name in compose.choices("experiment")}
    found: dict[str, Any] = {}
    for name, chosen in {"default": [], **experiments}.items():
        keys = schema.flatten(yaml.safe_load(printed("train", *chosen, "--cfg", "job")))
        usual = found.get("default", {})
        pairs = {key: (usual.get(key, ABSENT), keys.get(key, ABSENT)) for key in {**usual, **keys}}
        found[name] = {key: now for key, (before, now) in pairs.items() if now != before}
    return found


PLANS: dict[str, list[str]] = {
    "default on a laptop": ["cluster=laptop"],
    "tiny": ["experiment=tiny", "cluster=laptop"],
    "bert": ["experiment=bert_pretrain", "cluster=a100_40gbx2"],
    # Not of the data that happens to be prepared on this machine, whose lengths would be planned with.
    "translation": ["experiment=translation", "data.cache_dir=not/there", "cluster=a100_40gb"],
    "gpt2_124m": ["experiment=gpt2_124m", "data.path=corpus.txt", "cluster=a100_40gb"],
    "llama_1b": ["experiment=llama_1b", "data.path=corpus.txt", "cluster=h100", "explain=true"],
    "llama_7b": ["experiment=llama_7b", "data.path=corpus.txt", "cluster=h100x64", "tokens=1e12", "simulate=true"],
    "offload": ["model=llama_13b", "engine=zero3_offload", "cluster=a100_80gbx8",
                "train.activation_checkpointing=true"],
    "on the disk": ["experiment=billion_on_a_laptop", "cluster=laptop"],
    "70b": ["model=llama_70b", "engine=zero3", "cluster=b200x256", "train.global_batch=1024"],
}  # fmt: skip


def plans() -> dict[str, Any]:
    return {name: json.loads(printed("plan", "output=json", *chosen)) for name, chosen in PLANS.items()}


# ----------------------------------------------------------------------------------------------- ds_config


def ds_configs() -> dict[str, Any]:
    """{engine, device, precision: its ds_config on eight ranks}."""
    from bigtrain.engine.deepspeed import ds_config

    found: dict[str, Any] = {}
    engines = ENGINES | {
        "zero_infinity": {"kind": "deepspeed", "stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme",
                          "nvme_path": "/nvme"},
        "quantized": {"kind": "deepspeed", "stage": 3, "quantized_communication": True},
        "passed through": {"kind": "deepspeed", "stage": 2, "bucket_mib": 25, "overlap_comm": False,
                           "deepspeed": {"zero_optimization": {"round_robin_gradients": True}}},
    }  # fmt: skip
    for name, engine in engines.items():
        if engine["kind"] != "deepspeed":
            continue
        for device, precision, micro_batch in (("cuda", "bf16", 2), ("cpu", "fp32", 4)):
            train = {"global_batch": 32, "micro_batch": micro_batch, "precision": precision, "grad_clip": 0.5}
            config = from_dict({"engine": engine, "train": train})
            found[f"{name} {device} {precision}"] = ds_config(config, 8, device)
    muon = from_dict({"engine": ENGINES["zero3"], "optimizer": {"kind": "muon"}, "train": {"global_batch": 32}})
    found["zero3 cuda muon"] = ds_config(muon, 8, "cuda")
    return found


# ------------------------------------------------------------------------------------------------- recipes


def composed(overrides: list[str]) -> Config:
    """What the command line makes of these overrides."""
    jobs: list[dict[str, Any]] = []

    def keep(job: compose.Job) -> float:
        jobs.append(job.data)
        return 0.0

    with at_home():
        compose.run(overrides, keep)
        return checked(jobs[0])


def recipes(chosen: dict[str, Recipe]) -> dict[str, Any]:
    """{recipe: its config, without what is as it is by default}: also a file of today for later code to read."""
    found = {}
    for name, recipe in chosen.items():
        given = {override.partition("=")[0]: override for override in [*COMMON, *recipe.overrides]}
        config = composed([*given.values(), "run_dir=run"])
        found[name] = _at_home(_set(replace(config, run_dir="runs/latest")))
    return found


def _set(section: Any) -> dict[str, Any]:
    """The fields of a section that are not as they are by default, and its kind."""
    usual, found = asdict(type(section)()), {}
    for name, value in asdict(section).items():
        here = getattr(section, name)
        if hasattr(here, "__dataclass_fields__"):
            value = _set(here)
            if value or usual[name] is None:
                found[name] = value
        elif name == "kind" or value != usual[name]:
            found[name] = value
    return found


def _at_home(value: Any) -> Any:
    """Without this machine's path of the folder."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    return value.replace(f"{FOLDER}{os.sep}", "") if isinstance(value, str) else value


def prepared(data: dict[str, Any], cache: Path) -> Config:
    """A stored config, checked and with its data prepared. To be called at home."""
    config = checked(data)
    return prepare_data(replace(config, data=replace(config.data, cache_dir=str(cache))))


Curves = dict[str, dict[str, Any]]  # {name: {engine: curves}}


def walked(stored: dict[str, Any], folder: Path, only: Collection[str] = (*RECIPES, *RUNS)) -> tuple[Curves, Curves]:
    """What recipes give on each of their engines, and how stored runs go on, in one pair of processes.

    stored: configs as `recipes` gives them.
    """
    cells: list[tuple[int, str, str]] = []
    files = []
    with at_home():
        for kind, recipes in enumerate((RECIPES, RUNS)):
            for name, recipe in recipes.items():
                if name not in only:
                    continue
                config = prepared(stored[name], folder / "cache")
                for engine in recipe.engines:
                    path = folder / f"{name}-{engine}"
                    changed = replace(config, engine=from_dict({"engine": ENGINES[engine]}).engine)
                    if kind == 1:
                        changed = continued(name, changed, path)
                    cells.append((kind, name, engine))
                    files.append(str(write(path, changed)))
    found: tuple[Curves, Curves] = ({}, {})
    told = run_ranks("tests.goldens.walk:walk", 2, {"files": files})
    for (kind, name, engine), curves in zip(cells, told[0], strict=True):
        found[kind].setdefault(name, {})[engine] = curves
    return found[0], found[1]


def continued(name: str, config: Config, path: Path) -> Config:
    """The config with which a copy of a stored run, at `path`, goes on to its last step, as the command checks it."""
    shutil.copytree(FOLDER / "trained" / name, path)
    train = replace(config.train, stop_at=None)
    # The data's fingerprint holds the version of the tokenizers library.
    config = replace(config, train=train, run_dir=str(path), resume="required", resume_allow=["data"])
    before = run_dir.previous(path)
    assert before is not None
    found = run_dir.check_resume(path, config, before)
    assert found is not None
    for saved in (before, changes.config_of(found)):
        assert saved is not None
        changes.check(saved, config)
    return config


def evaluated(name: str, out: Path) -> dict[str, Any]:
    """Metrics of a stored run on a file."""
    texts = {"gpt_zero2": "documents.jsonl", "pruned_zero1": "documents.jsonl", "bert_zero3": "classes.tsv"}[name]
    run = out / name
    shutil.copytree(FOLDER / "trained" / name, run)
    printed("evaluate", str(run), "--data", str(FOLDER / "texts" / texts), "--out", str(out), "--device", "cpu")
    found = json.loads((out / "metrics.json").read_text())
    return {key: value for key, value in found.items() if key.startswith("eval/") or key == "checkpoint"}


def write(path: Path, config: Config) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(schema.dump(replace(config, run_dir=str(path))))
    return path / "config.yaml"


# ----------------------------------------------------------------------------------------- files, comparison


def first(by_engine: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the first engine: what is kept, the others must agree with it. Rounded: more digits are noise."""
    found = next(iter(by_engine.values()))
    assert "problem" not in found, found["problem"]
    kept: dict[str, Any] = {name: [rounded(value) for value in found[name].values()] for name in CURVES}
    return kept | {"eval": {name: rounded(value) for name, value in found["eval"].items()}}


def rounded(value: float) -> float:
    return float(f"{value:.7g}")


def trained(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """curves.json and trained.json."""
    curves, onwards = walked(read("recipes.yaml"), folder)
    runs = {
        name: {"evaluated": evaluated(name, folder / "evaluated" / name), "continued": first(by_engine)}
        for name, by_engine in onwards.items()
    }
    return {"made with": made_with()} | {name: first(found) for name, found in curves.items()}, runs


PRINTED: dict[str, Callable[[], Any]] = {
    "cfg.yaml": cfg,
    "recipes.yaml": lambda: recipes(RECIPES | RUNS),
    "ds_config.json": ds_configs,
    "plans.json": plans,
}
PARTS = (*PRINTED, "curves.json", "trained.json")


def made_with() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "deepspeed", "accelerate", "transformers", "hydra-core")}


def read(part: str) -> Any:
    text = (NUMBERS / part).read_text(encoding="utf-8")
    return yaml.safe_load(text) if part.endswith(".yaml") else json.loads(text)


def write_part(part: str, content: Any) -> None:
    NUMBERS.mkdir(exist_ok=True)
    if part.endswith(".yaml"):
        text = yaml.safe_dump(content, sort_keys=False, width=120)
    else:
        text = json.dumps(content, indent=1)
        text = re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), text)  # a list of numbers, a line
    (NUMBERS / part).write_text(text.rstrip() + "\n", encoding="utf-8")


def differences(stored: Any, now: Any, relative: float = 1e-9, name: str = "") -> Iterator[str]:
    """A line for each value that is another one now, or not there."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in {**stored, **now}:
            path = f"{name}: {key}" if name else str(key)
            if key not in now or key not in stored:
                yield f"{path} is {'gone' if key in stored else 'new'}"
            else:
                yield from differences(stored[key], now[key], relative, path)
    elif isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        for index, pair in enumerate(zip(stored, now, strict=True)):
            yield from differences(*pair, relative, f"{name}[{index}]")
    elif isinstance(stored, float) and isinstance(now, (int, float)):
        if not math.isclose(stored, now, rel_tol=relative, abs_tol=1e-12):
            yield f"{name} was {stored}, is {now}"
    elif stored != now:
        yield f"{name} was {stored!r}, is {now!r}"
