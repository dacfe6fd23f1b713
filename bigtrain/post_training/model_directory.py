"""A model as a directory that every command takes for a run: config, tokenizer, labels, and its weights as a checkpoint
of step 0 that has no optimizer, so that training goes on from it with `model=pretrained model.path=DIR`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bigtrain import config as schema
from bigtrain.checkpoint import newest, transfer
from bigtrain.checkpoint.find import FOLDER
from bigtrain.checkpoint.integrity import seal
from bigtrain.checkpoint.weights import write_weights
from bigtrain.compress import teacher
from bigtrain.compress_config import CompressConfig, QuantizeConfig
from bigtrain.config import LABELLED_TASKS, Config, HuggingFaceConfig, ModelConfig
from bigtrain.data.tokenizer import find_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.files import hidden_beside, write_atomic
from bigtrain.launch import train as launch
from bigtrain.models.stored import Quantized, stored
from bigtrain.worker import LABELS

TASKS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tagging",
}  # by the end of the class that a config.json names


def write(
    out: Path, config: Config, model: ModelConfig, tensors: Iterable[tuple[str, Tensor | Quantized]], tokenizer: Path,
    labels: Any, quantized: QuantizeConfig | None = None,
) -> Path:  # fmt: skip
    """`tokenizer`: a directory with tokenizer.json; `labels`: names of a classifier's outputs, or nothing;
    `quantized`: how those of `tensors` are that are integers."""
    staging = hidden_beside(out)
    shutil.rmtree(staging, ignore_errors=True)
    checkpoint = staging / FOLDER / "step-00000000"
    checkpoint.mkdir(parents=True)
    try:
        write_weights(checkpoint, stored(tensors))
        seal(checkpoint, {"step": 0, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "weights_only": True})
        written = replace(
            config, run_dir=str(out), resume="auto", init_from=None, model=model,
            compress=CompressConfig(quantize=quantized), train=replace(config.train, lora=schema.LoRAConfig()),
        )  # fmt: skip
        write_atomic(staging / "config.yaml", schema.dump(written))
        (staging / "tokenizer").mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, staging / "tokenizer" / file)
        if labels:
            write_atomic(staging / LABELS, json.dumps(labels, ensure_ascii=False, indent=1))
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return out


def open_source(
    path: Path, out: Path, task: str | None, data: list[str], held_out: list[str], columns: dict[str, str | int]
) -> Path:
    """RUN as it is, or of a Hugging Face directory the run directory made in `out`.

    Raises ConfigError for what is neither, a task that its config.json does not tell, or data that it does not fit.
    """
    if (path / "config.yaml").is_file():
        if newest(path) is None:
            raise ConfigError("RUN", str(path), "holds no complete checkpoint", "train until the first one is saved")
        if data or held_out or task:
            raise ConfigError("--data", " ".join(data), f"{path} is a run, which has data of its own", "leave it out")
        if schema.load(path / "config.yaml").compress.quantize is not None:
            problem = "has quantized weights already, which are what is to be kept"
            raise ConfigError("RUN", str(path), problem, "bigtrain export writes them")
        return path
    if not transfer.is_huggingface(path):
        problem = "is no run (config.yaml) and no Hugging Face directory (config.json)"
        raise ConfigError("RUN", str(path), problem, "name one that is")
    task = task or _task(path)
    settings: dict[str, Any] = {"task": {"kind": task}, "model": {"kind": "pretrained", "path": str(path)}}
    settings["data"] = {"kind": "stdlib"}
    if data:
        labelled = task in {kind for cls in LABELLED_TASKS for kind in schema.kinds(cls)}
        settings["data"] = {"kind": "labelled" if labelled else "text", "path": data}
        settings["data"] |= {"held_out_path": held_out} if held_out else {}
        settings["data"] |= {"columns": columns} if columns else {}
    if task == "masked_lm":
        settings["task"]["sentence"] = "none"
    settings["data"]["tokenizer"] = {"path": str(path)}
    settings["optimizer"] = {"kind": "adamw", "lr": 5e-5, "weight_decay": 0.01}
    config = launch.prepare_data(launch.checked(settings))
    names = _labels(config, path)
    tensors: Iterable[tuple[str, Tensor]]
    if isinstance(config.model, HuggingFaceConfig):
        from bigtrain import tasks

        model: Any = tasks.build(config).build_model(config.model)
        transfer.load_initial(model, str(path), new_heads=False)
        tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    else:
        tensors = _used(config, path)
    found = find_tokenizer(str(path), "RUN")
    folder = hidden_beside(out, "tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found.save(str(folder / "tokenizer.json"))
        return write(out, config, config.model, tensors, folder, names)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _used(config: Config, path: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights that the task's model has: a file may hold more heads, or a pooler that the task does not use."""
    import torch

    from bigtrain import tasks
    from bigtrain.models import huggingface

    with torch.device("meta"):
        model = tasks.build(config).build_model(config.model)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, tensor in huggingface.iterate_weights(path, huggingface.read_config(path, "RUN")):
        if wanted.get(name) == tensor.shape:
            del wanted[name]
            yield name, tensor
    if wanted:
        name, shape = next(iter(wanted.items()))
        problem = f"has no weights for {name} {tuple(shape)}, which task={config.task.kind} needs"
        raise ConfigError("RUN", str(path), problem)


def _task(path: Path) -> str:
    try:
        name = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        return next(task for ending, task in TASKS.items() if name.endswith(ending))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        raise ConfigError("RUN", str(path), "its config.json does not tell what it is for", "say --task KIND") from None


def _labels(config: Config, path: Path) -> list[str]:
    """Of the data, which must be the model's in the same order."""
    if config.task.kind not in ("classification", "tagging"):
        return []
    from bigtrain.data.examples import load_examples

    mine, theirs = load_examples(Path(config.data.prepared_dir or "")).labels, teacher.labels(path)
    if theirs and mine != theirs:
        raise ConfigError("--data", ",".join(mine[:8]), f"its labels are not the model's ({', '.join(theirs[:8])})")
    return mine
