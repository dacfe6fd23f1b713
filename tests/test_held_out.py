"""A sample of the held-out set and the whole of it have names of their own, and every reader keeps them apart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bigtrain import held_out, runs
from bigtrain.checkpoint import facts
from bigtrain.hooks.console import evaluation_line
from bigtrain.sweep.prune import Pruning


class Numbers(held_out.HeldOut):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return self.places()


@pytest.mark.parametrize(("most", "places", "share"), [(None, [0, 1, 2], 1), (3, [0, 1, 2], 1), (2, [0, 1], 8 / 10)])
def test_a_sample_is_one_where_it_is_smaller_than_the_set(most: int | None, places: list[int], share: float) -> None:
    batches = Numbers(10, 4, most)
    assert (list(batches), len(batches), batches.share) == (places, len(places), share)
    assert batches.whole == (share == 1)


def test_names_of_a_sample() -> None:
    found = held_out.of_sample({"eval/loss": 2.0, "privacy/epsilon": 1.0}, 0.25)
    assert found == {"eval_sample/loss": 2.0, "privacy/epsilon": 1.0, "eval_sample/share": 0.25}
    assert held_out.sample_name("-eval/accuracy") == "-eval_sample/accuracy"


def test_a_sample_is_said_to_be_one() -> None:
    assert evaluation_line({"eval/loss": 2.0, "eval/accuracy": 0.5}) == "held-out loss 2.0000  accuracy 0.5"
    sample = held_out.of_sample({"eval/loss": 2.0, "eval/accuracy": 0.5}, 256 / 1821)
    assert evaluation_line(sample) == "held-out loss 2.0000  accuracy 0.5  (14% of the held-out set)"


def test_what_an_earlier_evaluation_gave_is_not_taken_for_the_last_ones() -> None:
    rows = [{"step": 1, "eval/loss": 2.0}, {"step": 2, "eval_sample/loss": 1.0}, {"step": 3, "train/loss": 0.5}]
    assert held_out.latest(rows) == {"step": 3, "eval_sample/loss": 1.0, "train/loss": 0.5}


def test_the_best_loss_is_of_all_of_the_set_and_of_the_data_that_the_run_is_on() -> None:
    sample = {"step": 1, "data": "a", "eval_sample/loss": 1.0}
    whole = [{"step": 2, "data": "a", "eval/loss": 2.0}, {"step": 3, "data": "a", "eval/loss": 3.0}]
    assert runs.best([{"step": 1, "train/loss": 4.0}], "a") == (4.0, "training")
    assert runs.best([sample], "a") == (1.0, "sample")
    assert runs.best([sample, *whole], "a") == (2.0, "")
    assert runs.best([sample, *whole, {"step": 4, "data": "b", "eval_sample/loss": 5.0}], "b") == (5.0, "sample")
    assert runs.best([{"step": 2, "eval/loss": 2.0}], "a") == (2.0, "")  # of a version that did not say of which data


def test_the_manifest_says_what_its_metric_is_of() -> None:
    seen = held_out.of_sample({"eval/accuracy": 0.75}, 0.5)
    assert facts.metric("-eval/accuracy", seen) == {"name": "-eval_sample/accuracy", "value": -0.75, "share": 0.5}
    assert facts.metric("-eval/accuracy", {"eval/accuracy": 0.5}) == {
        "name": "-eval/accuracy", "value": -0.5, "share": 1.0,
    }  # fmt: skip
    assert facts.metric("eval/loss", {"eval/loss": math.nan}) is None


def test_a_sweep_prunes_by_the_sample_that_its_trials_are_seen_on(tmp_path: Path) -> None:
    rows = [{"step": 2, "eval_sample/accuracy": 0.5}, {"step": 4, "eval/accuracy": 0.25}, {"step": 5, "train/loss": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Pruning(tmp_path, "-eval/accuracy", {}, "", 0)._new_rows() == [(2, -0.5), (4, -0.25)]
