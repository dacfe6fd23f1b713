"""What may be another when a run goes on, what must be named, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.checkpoint import changes
from bigtrain.checkpoint.find import Checkpoint
from bigtrain.compress_config import CompressConfig, QuantizeConfig
from bigtrain.config import (
    ClassificationConfig,
    Config,
    DecoderConfig,
    DeepSpeedConfig,
    LinearScalingConfig,
    LionConfig,
    ScheduleConfig,
    StdlibDataConfig,
    TokenizerConfig,
    TrainConfig,
)
from bigtrain.errors import ConfigError


def config(**changed: object) -> Config:
    return replace(Config(), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"train": TrainConfig(seed=1)}, "train.seed is 0 there, 1 here: the order of the data follows it"),
        ({"train": TrainConfig(global_batch=64)}, "train.global_batch is 32 there, 64 here"),
        ({"data": StdlibDataConfig(held_out=0.1)}, "data.held_out is 0.05 there, 0.1 here"),
        ({"train": TrainConfig(seed=1, global_batch=64, micro_batch=4, grad_clip=2.0, precision="fp32")}, "and 1 more"),
        ({"model": DecoderConfig(dim=128)}, "model.dim is 256 there, 128 here: the weights would not fit"),
        ({"model": DecoderConfig(n_heads=8)}, "model.n_heads"),
        ({"model": DecoderConfig(rope_theta=5e5)}, "positions would mean something else"),
        ({"model": DecoderConfig(rope_scaling=LinearScalingConfig(factor=2.0))}, "positions would mean something else"),
        ({"data": StdlibDataConfig(tokenizer=TokenizerConfig(vocab_size=999))}, "token numbers would mean other text"),
        ({"optimizer": LionConfig()}, "optimizer.kind is adamw there, lion here"),
        ({"init_from": "elsewhere"}, "init_from is None there, elsewhere here"),
    ],
)
def test_another_run_is_refused_by_name(changed: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        changes.check(config(), config(**changed))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changed", [{"model": DecoderConfig(dim=128)}, {"train": TrainConfig(seed=1)}])
def test_what_would_not_fit_cannot_be_allowed(changed: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="holds another run"):
        changes.check(config(), config(resume_allow=["model", "train"], **changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"run_dir": "elsewhere", "resume": "required"},
        {"train": TrainConfig(steps=9999, micro_batch=1, eval_every=3, save_every=3, keep_checkpoints=9)},
        {"data": StdlibDataConfig(cache_dir="/elsewhere", workers=3)},
    ],
)
def test_what_is_free_is_not_even_listed(changed: dict[str, object]) -> None:
    assert changes.check(config(), config(**changed)) == []


def test_the_engine_may_change_and_is_listed() -> None:
    (found,) = changes.check(config(), config(engine=DeepSpeedConfig(stage=3)))
    assert (found.field, found.before, found.now, found.verdict) == ("engine.stage", 2, 3, "listed")


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"train": TrainConfig(global_batch=64, precision="fp32")}, ["train.global_batch", "train.precision"]),
        ({"schedule": ScheduleConfig(kind="linear")}, ["schedule.kind"]),
        ({"data": StdlibDataConfig(prepared_dir="/y/bbbb", held_out=0.1)}, ["data"]),
        ({"model": DecoderConfig(dropout=0.1)}, ["model.dropout"]),
        ({"compress": CompressConfig(quantize=QuantizeConfig(bits=4, start=5))}, ["compress.quantize"]),
    ],
)
def test_what_is_named_may_change(changed: dict[str, object], names: list[str]) -> None:
    before = config(data=StdlibDataConfig(prepared_dir="/x/aaaa")) if "data" in changed else config()
    with pytest.raises(ConfigError) as error:
        changes.check(before, config(**changed))
    for name in names:
        assert name in error.value.way_out.partition("resume_allow=[")[2]
    found = changes.check(before, config(**changed, resume_allow=names))
    assert found
    assert {change.verdict for change in found} == {"named"}
    with pytest.raises(ConfigError, match="holds another run"):
        changes.check(before, config(**changed, resume_allow=["optimizer.lr"]))


def test_weights_that_were_learned_rounded_stay_so() -> None:
    rounded, coarser = (config(compress=CompressConfig(quantize=QuantizeConfig(bits=bits))) for bits in (8, 4))
    for now in (coarser, config()):
        with pytest.raises(ConfigError, match=r"compress\.quantize\.bits is 8 there.*the weights would mean"):
            changes.check(rounded, replace(now, resume_allow=["compress"]))


def test_examples_grouped_by_length_keep_their_batch() -> None:
    before, now = (
        config(task=ClassificationConfig(), train=TrainConfig(global_batch=n), resume_allow=["train.global_batch"])
        for n in (32, 64)
    )
    with pytest.raises(ConfigError, match="grouped by length"):
        changes.check(before, now)


def test_a_mistyped_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"resume_allow='optimizer.lrr': no such field; did you mean optimizer.lr\?"):
        changes.check(config(), config(resume_allow=["optimizer.lrr"]))


def test_changed_data_are_another_run() -> None:
    before, now = (config(data=StdlibDataConfig(prepared_dir=f"/{name}")) for name in ("x/aaaa", "y/bbbb"))
    same = config(data=StdlibDataConfig(prepared_dir="/moved/aaaa"))
    changes.check(before, same)
    with pytest.raises(ConfigError, match=r"fingerprint.*aaaa there, bbbb here.*resume_allow=\[data\]"):
        changes.check(before, now)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    for folder, text in (("run/tokenizer", "one"), ("same", "one"), ("other", "two")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "tokenizer.json").write_text(text)
    changes.check_tokenizer(tmp_path / "run", str(tmp_path / "same"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*trained with another tokenizer.*data\.tokenizer\.path="):
        changes.check_tokenizer(tmp_path / "run", str(tmp_path / "other"))


def test_the_listing_is_a_block_for_the_eye() -> None:
    now = config(engine=DeepSpeedConfig(stage=3), train=TrainConfig(grad_clip=2.0), resume_allow=["train"])
    before = config()
    kept = Checkpoint(Path("runs/x/checkpoints/step-1"), 1, {"world_size": 2, "config": changes.recorded(before)})
    found = changes.check(changes.config_of(kept) or Config(), now)
    assert changes.listing(found, kept, 1).splitlines() == [
        "since runs/x/checkpoints/step-1 was saved:",
        "  engine.stage     2   -> 3",
        "  train.grad_clip  1.0 -> 2.0",
        "  ranks            2   -> 1",
    ]
    assert changes.listing([], kept, 2) == ""
