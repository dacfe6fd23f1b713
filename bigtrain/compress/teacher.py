"""A distillation's teacher: found and checked before the start, then built beside the student, never inside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import config as schema
from bigtrain import heap
from bigtrain.checkpoint import newest, transfer
from bigtrain.checkpoint.integrity import read_manifest, sha256
from bigtrain.checkpoint.weights import iterate_weights, load_matching, reads
from bigtrain.config import Config, EncoderConfig, HuggingFaceConfig, ModelConfig, Seq2SeqConfig
from bigtrain.data.tokenizer import find_tokenizer
from bigtrain.errors import BigtrainError, ConfigError

FIELD = "compress.distil.teacher"
LABELS = "labels.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_config(path: Path, task: str) -> ModelConfig:
    """Of a run or of a Hugging Face directory. Raises ConfigError for what is neither."""
    if (path / "config.yaml").is_file():
        return schema.load(path / "config.yaml").model
    if not transfer.is_huggingface(path):
        raise ConfigError(FIELD, str(path), "is no run and no Hugging Face directory", "name one that is")
    from bigtrain.models import huggingface
    from bigtrain.models.huggingface import auto

    try:
        return huggingface.read_config(path, FIELD)
    except ConfigError as ours:
        try:
            return auto.read_config(path, task, key=FIELD)
        except ConfigError:
            raise ours from None


# ------------------------------------------------------------------------------------------ before the start


def check(config: Config) -> None:
    """What the prepared data, the teacher and the student must have in common. Raises ConfigError."""
    settings = config.compress.distil
    assert settings is not None
    assert settings.teacher is not None
    path = Path(settings.teacher)
    teacher = model_config(path, config.task.kind)
    _check_vocabulary(config, path)
    _check_labels(config, path)
    if getattr(teacher, "positions", "learned") == "learned" and teacher.max_seq_len < config.model.max_seq_len:
        raise ConfigError(
            FIELD, settings.teacher, f"has {teacher.max_seq_len} positions, the student {config.model.max_seq_len}",
            f"take model.max_seq_len={teacher.max_seq_len}",
        )  # fmt: skip
    if settings.hidden and teacher.dim != config.model.dim:
        raise ConfigError(
            "compress.distil.hidden", settings.hidden,
            f"compares hidden states, of which the teacher's are {teacher.dim} wide and the student's"
            f" {config.model.dim}", "take compress.distil.attention, which any width can",
        )  # fmt: skip
    if settings.attention and isinstance(teacher, HuggingFaceConfig):
        raise ConfigError("compress.distil.attention", settings.attention, "the teacher is transformers' own code")
    student, theirs = count_layers(config.model), count_layers(teacher)
    if student is None or theirs is None:
        if settings.layers or settings.init_from_teacher:
            raise ConfigError("compress.distil.layers", settings.layers, "the student or the teacher has no layers")
        return
    layer_map(settings.layers, student, theirs)
    if settings.init_from_teacher:
        _check_start(config, teacher)


def _check_vocabulary(config: Config, path: Path) -> None:
    """The same tokens under the same numbers."""
    from bigtrain.data import load_prepared
    from bigtrain.data.examples import load_examples

    directory = Path(config.data.prepared_dir or "")
    labelled = isinstance(config.task, schema.LABELLED_TASKS)
    file = (load_examples(directory) if labelled else load_prepared(directory)).tokenizer_file
    mine = find_tokenizer(str(file), "data.tokenizer.path").get_vocab(with_added_tokens=True)
    theirs = find_tokenizer(
        str(path / "tokenizer") if (path / "config.yaml").is_file() else str(path), FIELD
    ).get_vocab(with_added_tokens=True)
    if mine != theirs:
        differing = len(set(mine.items()) ^ set(theirs.items()))
        raise ConfigError(
            FIELD, str(path), f"its vocabulary ({len(theirs)} tokens) is not the student's ({len(mine)}):"
            f" {differing} tokens or numbers differ", f"take data.tokenizer.path={path}",
        )  # fmt: skip


def _check_labels(config: Config, path: Path) -> None:
    """A classifier's outputs must mean the same, in the same order."""
    if config.task.kind not in ("classification", "tagging"):
        return
    from bigtrain.data.examples import load_examples

    mine, theirs = load_examples(Path(config.data.prepared_dir or "")).labels, labels(path)
    if mine and theirs and mine != theirs:
        raise ConfigError(
            FIELD, str(path), f"its labels are {', '.join(theirs[:8])}, the student's {', '.join(mine[:8])}",
            "train it on data with these labels",
        )  # fmt: skip


def labels(path: Path) -> list[str]:
    """The names of a classifier's outputs; empty where they have none of their own."""
    try:
        if (path / LABELS).is_file():
            return [str(name) for name in json.loads((path / LABELS).read_text(encoding="utf-8"))]
        named = json.loads((path / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
        found = [str(named[str(index)]) for index in range(len(named))]
    except (OSError, ValueError, KeyError, AttributeError):
        return []
    return [] if all(name == f"LABEL_{index}" for index, name in enumerate(found)) else found


def _check_start(config: Config, teacher: ModelConfig) -> None:
    """Weights are copied layer by layer: they must have the same shapes."""
    for name in ("kind", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "activation", "norm", "positions"):
        mine, theirs = getattr(config.model, name, None), getattr(teacher, name, None)
        if mine != theirs:
            raise ConfigError(
                "compress.distil.init_from_teacher", True, f"model.{name} is {mine}, the teacher's {theirs}",
                f"take model=pretrained model.path={config.compress.distil.teacher} model.n_layers=N"
                if config.compress.distil
                else "",
            )  # fmt: skip


def count_layers(model: ModelConfig) -> int | None:
    """Layers that can be mapped; None of an encoder-decoder, which has two stacks of them."""
    if isinstance(model, Seq2SeqConfig):
        return None
    if not isinstance(model, HuggingFaceConfig):
        return model.n_layers
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    return next((n for name in names if isinstance(n := model.architecture.get(name), int)), None)


def layer_map(asked: list[int], student: int, teacher: int) -> list[int]:
    """Of each of the student's layers, the teacher's that it learns from; by default the last of as many equal parts
    (TinyBERT, arXiv 1909.10351, section 4.1). Raises ConfigError for one that there is not."""
    name = "compress.distil.layers"
    if not asked:
        if student > teacher:
            raise ConfigError(
                name, asked, f"the student has {student} layers, more than the teacher's {teacher}",
                f"name a layer of the teacher for each, {student} numbers from 0 to {teacher - 1}",
            )  # fmt: skip
        return [(index + 1) * teacher // student - 1 for index in range(student)]
    if len(asked) != student:
        raise ConfigError(name, asked, f"names {len(asked)} layers, the student has {student}", "name one for each")
    if bad := [layer for layer in asked if not 0 <= layer < teacher]:
        raise ConfigError(name, asked, f"the teacher has no layer {bad[0]}", f"its layers are 0 to {teacher - 1}")
    return asked


# -------------------------------------------------------------------------------------------------- building


def weights(path: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in `model`'s way of naming, tensor) of the teacher's files; on the meta device where this rank need not
    read."""
    read = reads(model)
    if transfer.is_huggingface(path) and transfer.is_transformers(model):
        from bigtrain.models.huggingface import auto

        return auto.iterate_weights(model, path, read)  # type: ignore[arg-type]
    if transfer.is_huggingface(path):
        from bigtrain.models import huggingface

        return huggingface.iterate_weights(path, huggingface.read_config(path, FIELD), read=read)
    checkpoint = newest(path)
    if checkpoint is None:
        raise ConfigError(FIELD, str(path), "holds no complete checkpoint", "train it until the first one is saved")
    return iterate_weights(checkpoint, read)


def build(config: Config, task: Any, device: torch.device) -> Any:
    """The teacher with the task's head, frozen and in evaluation mode: a module, or with `teacher_sharded` DeepSpeed's
    engine around one. No random number is drawn. Raises BigtrainError for a weight that its files do not hold."""
    settings = config.compress.distil
    assert settings is not None
    assert settings.teacher is not None
    path = Path(settings.teacher)
    found = model_config(path, config.task.kind)
    if isinstance(found, EncoderConfig):
        unpadded = isinstance(config.model, EncoderConfig) and config.model.unpadded
        found = replace(found, unpadded=unpadded, dropout=0.0)  # hidden states of both lie alike
    elif not isinstance(found, HuggingFaceConfig):
        found = replace(found, dropout=0.0)

    def make() -> nn.Module:
        model: nn.Module = task.build_model(found)
        return model

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if settings.teacher_sharded:
            return _sharded(make, path, config.train.precision)
        return _whole(make, path, DTYPES[config.train.precision], device)


def _whole(make: Any, path: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = make()
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    _load(model, path)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    evaluating: nn.Module = model.eval()
    return evaluating


def _sharded(make: Any, path: Path, precision: str) -> Any:
    """An engine of ZeRO-3 without an optimizer: parameters are gathered layer by layer."""
    import deepspeed

    world_size = torch.distributed.get_world_size()
    settings = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100_000},
        "steps_per_print": None,
    }
    with heap.trimmed_while_born(), deepspeed.zero.Init(config_dict_or_path=settings):
        model = make()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _load(model, path)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


def _load(model: nn.Module, path: Path) -> None:
    report = load_matching(model, weights(path, model))
    new = [name for name in report.new if not name.startswith("pair_head.")]
    if new:
        why = f" ({report.skipped[new[0]]})" if new[0] in report.skipped else ""
        raise BigtrainError(
            f"{FIELD}={path}: has no weights for {new[0]}{why}, which this task needs; train it on this task first"
        )


def fingerprint(path: Path) -> str:
    """SHA-256 of what the teacher is: of its files' hashes."""
    import hashlib

    if (path / "config.yaml").is_file():
        checkpoint = newest(path)
        assert checkpoint is not None
        files = {name: file["sha256"] for name, file in read_manifest(checkpoint)["files"].items() if "model" in name}
    else:
        files = {file.name: sha256(file) for file in sorted(path.glob("*.safetensors"))}
        files["config.json"] = sha256(path / "config.json")
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
