"""Counts without building anything, against the modules themselves and against published integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as models_of_tokenizers

from bigtrain import models
from bigtrain.config import Config, EncoderConfig, HuggingFaceConfig, MuonConfig, from_dict
from bigtrain.data.tokenizer import find_tokenizer, vocabulary_size
from bigtrain.engine import optimizers
from bigtrain.errors import ConfigError
from bigtrain.models import heads
from bigtrain.models.lora import add_lora
from bigtrain.plan import sizes
from bigtrain.tasks.labelled import WithHead, build_encoder
from bigtrain.tasks.masked_lm import MaskedLMModel
from tests.models.test_presets import OURS, PUBLISHED, preset


def built(config: Config) -> Any:
    """The module that a run trains, on the meta device."""
    model, task = config.model, config.task
    assert not isinstance(model, HuggingFaceConfig)
    with torch.device("meta"):
        if not isinstance(model, EncoderConfig):
            module: Any = models.build(model)
        elif task.kind == "masked_lm":
            pairs = task.sentence != "none"
            backbone = build_encoder(model, pooled=pairs)
            head = heads.MaskedLMHead(backbone.config, backbone.embedding)
            module = MaskedLMModel(backbone, head, heads.PairHead(backbone.config) if pairs else None)
        else:
            pooled = task.kind == "classification"
            backbone = build_encoder(model, pooled)
            if task.kind == "question_answering":
                module = WithHead(backbone, heads.QuestionAnsweringHead(backbone.config, 0.1), pooled)
            else:
                labels = 1 if getattr(task, "regression", False) else sizes.LABELS
                module = WithHead(backbone, heads.ClassificationHead(backbone.config, labels, 0.1), pooled)
        if config.train.lora.rank:
            add_lora(module, config.train.lora)
    return module


def names_and_shapes(module: Any) -> list[tuple[str, tuple[int, ...], bool]]:
    return [(name, tuple(each.shape), each.requires_grad) for name, each in module.named_parameters()]


def counted(config: Config) -> list[tuple[str, tuple[int, ...], bool]]:
    return [(each.name, each.shape, each.trained) for each in sizes.of_run(config).parameters]


def steps_with_muon(module: Any) -> list[str]:
    optimizers.parameter_groups(module, MuonConfig())
    return [name for name, each in module.named_parameters() if each.requires_grad and each.use_muon]


def hidden(found: sizes.Sizes) -> list[str]:
    return [each.name for each in found.parameters if each.trained and each.hidden]


@pytest.mark.parametrize("name", [*PUBLISHED, *OURS])
def test_every_preset_parameter_by_parameter(name: str) -> None:
    config = preset(name)
    config.vocab_size = config.vocab_size or 4096
    assert not isinstance(config, HuggingFaceConfig)
    found = sizes.of_model(config)
    with torch.device("meta"):
        module = models.build(config)
    assert [(each.name, each.shape) for each in found.parameters] == [row[:2] for row in names_and_shapes(module)]
    assert found.total == PUBLISHED.get(name, found.total) == sum(found.by_part().values())
    assert hidden(found) == steps_with_muon(module)


TASKS: list[dict[str, Any]] = [
    {"task": {"kind": "masked_lm"}},
    {"task": {"kind": "masked_lm", "sentence": "none"}},
    {"task": {"kind": "classification"}},
    {"task": {"kind": "classification", "regression": True}},
    {"task": {"kind": "tagging"}},
    {"task": {"kind": "question_answering"}},
    {"task": {"kind": "masked_lm"}, "model": {"norm_first": True, "bias": False, "norm": "rmsnorm", "token_types": 3}},
    {"task": {"kind": "classification"}, "train": {"lora": {"rank": 4}}},
    {"task": {"kind": "tagging"}, "train": {"lora": {"rank": 4, "targets": ["*"]}}, "model": {"bias": False}},
]


@pytest.mark.parametrize("changes", TASKS, ids=str)
def test_an_encoder_with_each_tasks_head(changes: dict[str, Any]) -> None:
    model = {"kind": "encoder", "dim": 64, "vocab_size": 512} | changes.get("model", {})
    config = from_dict({"model": model, "task": changes["task"], "train": changes.get("train", {})})
    module = built(config)
    assert counted(config) == names_and_shapes(module)
    assert hidden(sizes.of_run(config)) == steps_with_muon(module)


def test_a_decoder_with_lora_trains_what_the_module_trains() -> None:
    model = {"kind": "decoder", "dim": 64, "vocab_size": 512, "n_kv_heads": 2, "activation": "swiglu"}
    config = from_dict({"model": model, "train": {"lora": {"rank": 8}}})
    assert counted(config) == names_and_shapes(built(config))
    assert 0 < sizes.of_run(config).trained < sizes.of_run(config).total


def test_frozen_weights_are_counted_but_not_trained() -> None:
    config = from_dict({"model": {"kind": "decoder", "vocab_size": 512}, "train": {"freeze": ["embedding.*"]}})
    found = sizes.of_run(config)
    assert found.total - found.trained == 512 * 256


def test_the_vocabulary_is_the_tokenizers_rounded_as_train_rounds_it() -> None:
    config = from_dict({"data": {"kind": "stdlib", "tokenizer": {"vocab_size": 1000}}})
    assert sizes.with_vocabulary(config).model.vocab_size == 1024
    with pytest.raises(ConfigError, match="only the built-in architectures"):
        sizes.with_vocabulary(from_dict({"model": {"kind": "hf"}}))


def test_the_vocabulary_of_a_tokenizer_by_path_is_the_librarys(tmp_path: Path) -> None:
    words = [f"word{index}" for index in range(990)]
    for name, model in {
        "bpe": models_of_tokenizers.BPE({word: index for index, word in enumerate(words)}, []),
        "unigram": models_of_tokenizers.Unigram([(word, -1.0) for word in words], 0),
    }.items():
        tokenizer = Tokenizer(model)
        tokenizer.add_special_tokens([f"<{index}>" for index in range(40)])
        (tmp_path / name / "tokenizer").mkdir(parents=True)
        tokenizer.save(str(tmp_path / name / "tokenizer" / "tokenizer.json"))
        loaded = find_tokenizer(str(tmp_path / name))
        config = from_dict({"data": {"kind": "stdlib", "tokenizer": {"path": str(tmp_path / name)}}})
        assert vocabulary_size(loaded) == 1030
        assert sizes.with_vocabulary(config).model.vocab_size == 1088  # as launch/train.prepare_data rounds it
        assert not sizes.guesses_vocabulary(config)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    config = from_dict({"data": {"kind": "stdlib", "tokenizer": {"path": str(tmp_path)}}})
    with pytest.raises(ConfigError, match="is no tokenizer"):
        sizes.with_vocabulary(config)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_heads_of_a_size_of_their_own(kind: str) -> None:
    shape = {"kind": kind, "dim": 64, "n_heads": 6, "head_dim": 8, "n_layers": 2, "vocab_size": 100}
    task = {"kind": "causal_lm" if kind == "decoder" else "tagging"}
    config = from_dict({"model": shape, "task": task, "data": {"kind": "stdlib" if kind == "decoder" else "labelled"}})
    assert counted(config) == names_and_shapes(built(config))
