"""What a budget buys: sizes that fit and no larger ones, the optimum as published, and a law read back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.checks import check
from bigtrain.config import AdafactorConfig, Config, DecoderConfig, EncoderConfig
from bigtrain.errors import ConfigError
from bigtrain.plan import budget, clusters, recommend, sizes
from tests.plan.test_recommend import CONFIG, H100, LADDER, LLAMA


def test_the_largest_model_fits_and_a_wider_one_does_not() -> None:
    node = clusters.find("h100x8")
    config = replace(CONFIG, train=replace(CONFIG.train, global_batch=8))
    largest = budget.largest_model(config, node)
    model = largest.config.model
    assert isinstance(model, DecoderConfig)
    assert largest.room.fits
    wider = budget.shaped_like(largest.config, model.dim + 128)
    assert not recommend.room(wider, node, 8, sizes.of_run(wider)).fits
    assert 5e10 < sizes.of_run(largest.config).total < 5e11


def test_the_largest_model_of_an_optimizer_without_zero() -> None:
    """Adafactor runs at stage 0 only: that is no reason to say that not even the narrowest model fits."""
    config = replace(CONFIG, optimizer=AdafactorConfig(), train=replace(CONFIG.train, global_batch=8))
    largest = budget.largest_model(config, clusters.find("h100x8"))
    assert 1e9 < sizes.of_run(largest.config).total < 1e10


def test_heads_of_another_size_than_dim_over_heads_keep_it() -> None:
    """As Qwen3 0.6B: 1,024 wide, 16 heads of 128."""
    own = replace(CONFIG, model=replace(LLAMA, dim=1024, n_heads=16, n_kv_heads=8, head_dim=128, ffn_dim=3072))
    assert budget.shaped_like(own, 1024) == own
    assert budget.shaped_for(own, sizes.of_run(own).total) == own
    double = budget.shaped_like(own, 2048).model
    assert isinstance(double, DecoderConfig)
    assert (double.dim, double.n_heads, double.n_kv_heads, double.head_dim) == (2048, 32, 16, 128)


def test_a_family_keeps_its_shape() -> None:
    grouped = replace(CONFIG, model=replace(LLAMA, n_kv_heads=8))
    for parameters in (1e9, 7e9, 7e10):
        shaped = budget.shaped_for(grouped, parameters)
        model = shaped.model
        assert isinstance(model, DecoderConfig)
        check(shaped)
        assert sizes.of_run(shaped).total == pytest.approx(parameters, rel=0.2)
        assert model.dim // model.n_heads == 128
        assert model.n_heads == 4 * (model.n_kv_heads or 0)
        assert model.dim / model.n_layers == pytest.approx(128, rel=0.1)
    with pytest.raises(ConfigError, match="only decoders"):
        budget.shaped_like(Config(model=EncoderConfig(vocab_size=100)), 128)


def test_chinchillas_optimum_as_corrected() -> None:
    """arXiv 2404.10102: the corrected law agrees with Chinchilla's 70B on 1.4T tokens for 5.76e23 operations."""
    found = budget.compute_optimal(5.76e23)
    assert found.parameters == pytest.approx(70e9, rel=0.1)
    assert found.tokens == pytest.approx(1.4e12, rel=0.1)
    assert 6 * found.parameters * found.tokens == pytest.approx(5.76e23)
    for factor in (0.8, 1.25):  # a minimum: more of the one for less of the other is worse
        assert budget.CHINCHILLA.loss(found.parameters * factor, found.tokens / factor) > found.loss
    near = budget.compute_optimal(1e21)

    def width(optimum: budget.Optimum) -> float:
        return optimum.parameters_interval[1] / optimum.parameters_interval[0]

    assert found.parameters_interval[0] < found.parameters < found.parameters_interval[1]
    assert width(found) > width(near) > 1
    with pytest.raises(ConfigError, match="budget"):
        budget.compute_optimal(0)


def test_a_budget_buys_what_it_costs() -> None:
    hours = budget.hours_for_dollars(10_000, H100)
    assert hours == pytest.approx(10_000 / (32 * 2.99))
    bought = budget.buy(CONFIG, H100, hours)
    assert bought.cost == pytest.approx(10_000)
    # Training that model on those tokens takes those hours.
    tokens_per_second = bought.time.tokens_per_second
    assert bought.optimum.tokens / tokens_per_second / 3600 == pytest.approx(hours, rel=0.25)
    for dollars in (0, -1):
        with pytest.raises(ConfigError, match="budget"):
            budget.hours_for_dollars(dollars, H100)
    with pytest.raises(ConfigError, match="has no price"):
        budget.hours_for_dollars(1, clusters.find("laptop"))


def test_tokens_to_a_loss_from_a_ladder(tmp_path: Path) -> None:
    file = tmp_path / "ladder.json"
    file.write_text(json.dumps({"E": 1.5, "A": 400.0, "a": 0.34, "B": 1800.0, "b": 0.36, "runs": 6}))
    law = budget.read_law(file)
    tokens = budget.tokens_to_loss(2.5, 1e9, law)
    assert law.loss(1e9, tokens) == pytest.approx(2.5)
    with pytest.raises(ConfigError, match="take more than"):
        budget.tokens_to_loss(1.8, 1e7, law)
    with pytest.raises(ConfigError, match="no model reaches it"):
        budget.tokens_to_loss(1.4, 1e9, law)


def test_a_ladders_intervals_are_its_own(tmp_path: Path) -> None:
    def law(**changed: object) -> budget.FittedLaw:
        file = tmp_path / "ladder.json"
        file.write_text(json.dumps(LADDER | changed))
        return budget.read_law(file)

    ours = law()
    assert ours.middle_flops == pytest.approx(6 * 1e7 * 2e8)  # of its points, not of Chinchilla's
    assert ours.a_error == pytest.approx(0.04 / 1.645)
    optimum = budget.compute_optimal(ours.middle_flops, ours)
    assert optimum.parameters_interval[0] == pytest.approx(optimum.parameters_interval[1])
    surer = law(intervals=LADDER["intervals"] | {"a": [0.33, 0.35]})  # type: ignore[operator]
    for find in (
        lambda law: budget.compute_optimal(1e21, law).parameters_interval,
        lambda law: budget.tokens_interval(2.5, 1e9, law),
    ):
        (low, high), (surer_low, surer_high) = find(ours), find(surer)
        assert low < surer_low < surer_high < high
    assert not law(intervals={}, points=[]).known
    wild = law(intervals={key: [0.0, 3.0] for key in ("E", "A", "a", "B", "b")})  # of too few runs
    assert budget.tokens_interval(2.5, 1e9, wild)[1] == math.inf
    low, high = budget.compute_optimal(1e30, wild).parameters_interval
    assert 0 < low < high < math.inf


def test_tokens_to_a_loss_have_an_interval() -> None:
    law = budget.CHINCHILLA
    tokens = budget.tokens_to_loss(2.3, 7e9, law)
    low, high = budget.tokens_interval(2.3, 7e9, law)
    assert low < tokens < high
    further = budget.tokens_interval(2.1, 7e9, law)
    assert further[1] / further[0] > high / low
    # So near to where this size ends that the law may be off by what is left.
    assert budget.tokens_interval(2.02, 7e9, law)[1] == math.inf


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("key", ["E", "A", "b", "intervals", "points"])
def test_a_ladder_of_no_numbers_is_refused(tmp_path: Path, key: str, value: str) -> None:
    number = float(value)
    broken: object = number
    if key == "intervals":
        broken = {name: [1.0, number] for name in ("E", "A", "a", "B", "b")}
    elif key == "points":
        broken = [{"parameters": number, "tokens": 1e9}]
    file = tmp_path / "ladder.json"
    file.write_text(json.dumps(LADDER | {key: broken}))
    with pytest.raises(ConfigError, match="ladder="):
        budget.read_law(file)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"E": 1, "A": "x", "a": 1, "B": 1, "b": 1}'])
def test_a_bad_ladder_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ladder.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="ladder"):
        budget.read_law(file)
    with pytest.raises(ConfigError, match="ladder"):
        budget.read_law(tmp_path / "none.json")
