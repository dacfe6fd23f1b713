"""conf/model: every preset builds, and the published ones have exactly the published number of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.config import ModelConfig, from_dict
from bigtrain.models import count_parameters

PRESETS = Path(__file__).parents[2] / "conf" / "model"
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
    "llama_1b": 1_235_814_400,  # Llama 3.2 1B
    "llama_7b": 6_738_415_616,  # Llama 2
    "llama_13b": 13_015_864_320,
    "llama_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama_405b": 405_853_388_800,  # Llama 3.1
    "bert_tiny": 4_385_920,  # arXiv 1908.08962, as are the next three: BertModel of transformers, with its pooler
    "bert_mini": 11_170_560,
    "bert_small": 28_763_648,
    "bert_medium": 41_373_184,
    "bert_base": 109_482_240,
    "bert_large": 335_141_888,
    "modern_bert_base": 149_014_272,  # ModernBertModel
    # arXiv 1706.03762, which rounds to 65M and 213M. By hand, of V words, L + L layers and width d, each with biases:
    # V d + L (12 d^2 + 13 d) + L (16 d^2 + 19 d) + 4 d, the 4 d being the two last norms.
    "transformer_base": 37_000 * 512 + 6 * (28 * 512**2 + 32 * 512) + 4 * 512,  # 63,084,544
    "transformer_big": 37_000 * 1024 + 6 * (28 * 1024**2 + 32 * 1024) + 4 * 1024,  # 214,249,472
}
OURS = {"gpt_1m": (0.9e6, 1.1e6), "gpt_mini": (5e6, 8e6), "llama_20m": (18e6, 22e6), "llama_100m": (95e6, 105e6)}
OURS |= {"transformer_tiny": (1.4e6, 1.5e6), "bert_micro": (0.9e6, 1.0e6)}


def preset(name: str, **changes: Any) -> ModelConfig:
    fields = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    base, own = fields.pop("defaults")
    assert base in ("_decoder", "_encoder", "_seq2seq")
    assert own == "_self_"
    return from_dict({"model": {"kind": base.removeprefix("_")} | fields | changes}).model


def test_every_preset_is_counted_here() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(PUBLISHED) | set(OURS) | {"pretrained", "hf"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name: str) -> None:
    assert count_parameters(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", OURS)
def test_small_presets_are_the_size_their_name_says(name: str) -> None:
    config = preset(name)
    config.vocab_size = config.vocab_size or 4096
    low, high = OURS[name]
    assert low < count_parameters(config) < high


def test_learned_positions_follow_max_seq_len() -> None:
    assert count_parameters(preset("gpt2_124m", max_seq_len=512)) == PUBLISHED["gpt2_124m"] - 512 * 768
