"""Labelled examples are planned as long as they are, where their data is prepared; else the plan says what it took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigtrain.batch import Batch
from bigtrain.config import Config
from bigtrain.data import prepare_examples
from bigtrain.data.example_loader import ExampleTrainLoader, Rows, Share, pad
from bigtrain.data.examples import Examples
from bigtrain.data.sampler import GROUPED
from bigtrain.plan import clusters, flops, lengths, planner, sizes
from tests.data.test_examples import config, sentences, tsv


@pytest.fixture
def labelled(tmp_path: Path) -> Config:
    path = tsv(tmp_path, "a.tsv", [*sentences(300), ("red " * 60, "good")])
    return replace(
        config(tmp_path, {"kind": "classification"}, path=path),
        train=replace(config(tmp_path, {"kind": "classification"}).train, global_batch=8),
    )


def test_lengths_are_those_of_the_loaders_batches(labelled: Config) -> None:
    assert lengths.located(labelled) == labelled
    assert lengths.unknown(labelled)
    prepared = prepare_examples(labelled)
    found = lengths.located(labelled)
    assert found.data.prepared_dir == str(prepared.directory)

    def collate(rows: Rows, random: np.random.Generator | None) -> Batch:
        return {"tokens": pad(rows, "tokens", 0, 24)}

    share = Share(rank=0, world_size=1, global_batch=8, micro_batch=8, seed=labelled.train.seed)
    loader = ExampleTrainLoader(Examples(prepared, "train"), collate, share)
    real = [batch["tokens"].size(1) for step in range(GROUPED) for batch in loader.batches(step)]
    found = sizes.with_vocabulary(found)
    known = lengths.of(found)
    assert known is not None
    assert known.typical == flops.sequence_length(found) == round(float(np.mean(real))) < 24
    assert known.longest == flops.longest_sequence(found) == 24
    assert flops.sequence_length(sizes.with_vocabulary(labelled)) == 24


def test_a_plan_says_what_it_took_and_its_interval_begins_with_shorter_ones(labelled: Config) -> None:
    cluster = clusters.find("laptop")
    guessed = planner.make(labelled, cluster)
    assert sum("the data is not prepared here" in note for note in guessed.warnings) == 1
    prepare_examples(labelled)
    plan = planner.make(sizes.with_vocabulary(lengths.located(labelled)), cluster)
    assert not any("the data is not prepared here" in note for note in plan.warnings)
    assert plan.step_seconds is not None
    assert guessed.step_seconds is not None
    assert guessed.intervals["step_seconds"][0] <= plan.step_seconds < guessed.step_seconds
    assert plan.memory["peak"] <= guessed.memory["peak"]


def test_a_hub_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    named = config(tmp_path, {"kind": "classification"}, path="someone/some-data")
    assert lengths.located(named) == named
