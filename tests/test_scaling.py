"""The scaling law: fitted to points whose constants are known, and to directories as runs leave them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bigtrain import scaling
from bigtrain.cli import command
from bigtrain.config import Config, dump
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.law import Law
from bigtrain.scaling import Point

# What Hoffmann et al. found (arXiv 2203.15556, equation 10), and a law as steep as small models show.
CHINCHILLA = Law(E=1.69, A=406.4, a=0.34, B=410.7, b=0.28)
SMALL = Law(E=1.2, A=60.0, a=0.35, B=900.0, b=0.42)
SIZES = (3e5, 1e6, 3e6, 1e7, 2e7)
RATIOS = (1.0, 4.0, 20.0)


def ladder(law: Law, noise: float = 0.0) -> list[Point]:
    generator = np.random.default_rng(1)
    return [
        Point(n, n * ratio, law.loss(n, n * ratio) * float(np.exp(noise * generator.normal())), f"{n:g}-{ratio:g}")
        for n in SIZES for ratio in RATIOS
    ]  # fmt: skip


@pytest.mark.parametrize("law", [CHINCHILLA, SMALL], ids=["Chinchilla", "small"])
def test_exact_points_give_their_constants_back(law: Law) -> None:
    found = scaling.fit(ladder(law), bootstraps=0).law
    for name in ("E", "a", "b"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.02), name
    assert found.loss(7e10, 1.4e12) == pytest.approx(law.loss(7e10, 1.4e12), rel=0.02)  # far out


def test_the_largest_size_is_predicted_by_a_fit_that_has_not_seen_it() -> None:
    points = ladder(SMALL, noise=0.002)
    found = scaling.climb(points, bootstraps=5)
    assert {check.parameters for check in found.checks} == {2e7}
    assert len(found.checks) == len(RATIOS)
    for check in found.checks:
        assert check.error is not None
        assert abs(check.error) < 0.02
        assert check.interval[0] <= check.interval[1]
    assert {prediction.parameters for prediction in found.next} == {4e7}
    spoilt = [
        Point(point.parameters, point.tokens, point.loss * (2 if point.parameters == 2e7 else 1)) for point in points
    ]
    again = scaling.climb(spoilt, bootstraps=0)
    assert [check.predicted for check in again.checks] == [check.predicted for check in found.checks]
    assert all(check.error is not None and check.error < -0.45 for check in again.checks)


def test_an_interval_holds_the_truth() -> None:
    found = scaling.fit(ladder(SMALL, noise=0.005), bootstraps=20)
    low, high = found.interval(4e7, 4e8)
    assert low <= SMALL.loss(4e7, 4e8) <= high
    assert high / low < 1.2


def test_an_irreducible_loss_that_the_runs_do_not_show_is_not_claimed() -> None:
    shown = scaling.lines(scaling.Ladder([], scaling.Fit(Law(E=float(np.exp(-10)), A=1, a=1, B=1, b=1), []), [], []))
    assert any("do not show where the loss would stay" in line for line in shown)
    shown = scaling.lines(scaling.Ladder([], scaling.Fit(SMALL, []), [], []))
    assert not any("do not show" in line for line in shown)


def test_ratios_that_whole_steps_have_moved_apart_are_one_line() -> None:
    points = [Point(174e3, 86e3, 5.9), Point(446e3, 223e3, 5.0), Point(174e3, 174e3, 5.6), Point(446e3, 446e3, 4.5)]
    assert [(ratio, len(group)) for ratio, group in scaling.by_ratio(points)] == [(0.5, 2), (1.0, 2)]


def test_compute_is_split_as_the_paper_says() -> None:
    """Equation 4, at Gopher's budget: the paper's table 3 has 67B parameters there by other approaches, 40B by this."""
    parameters, tokens = CHINCHILLA.best_split(5.76e23)
    assert 6 * parameters * tokens == pytest.approx(5.76e23)
    around = [CHINCHILLA.loss(factor * parameters, tokens / factor) for factor in (0.5, 0.9, 1, 1.1, 2)]
    assert min(around) == around[2]


def test_points_that_cannot_tell_are_refused() -> None:
    one_ratio = [Point(n, 20 * n, 3.0) for n in (1e5, 2e5, 4e5, 8e5, 1e6, 2e6)]
    with pytest.raises(BigtrainError, match=r"at 1$"):
        scaling.fit(one_ratio)


def write_runs(folder: Path, prepared: str = "abc") -> None:
    for number, point in enumerate(ladder(SMALL)):
        run = folder / str(number)
        run.mkdir(parents=True)
        result = {"status": "finished", "model/parameters": point.parameters, "data/tokens": point.tokens,
                  "eval/loss": point.loss}  # fmt: skip
        (run / "result.json").write_text(json.dumps(result))
        config = Config(run_dir=str(run))
        config.data.prepared_dir = f"/cache/{prepared}"
        (run / "config.yaml").write_text(dump(config))


def test_the_report_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.write, "__defaults__", (None, 5))
    write_runs(tmp_path / "sweep")
    done = CliRunner().invoke(command, ["report", "--ladder", str(tmp_path / "sweep")])
    assert done.exit_code == 0, done.output
    assert "held out: 20M parameters" in done.output
    assert (tmp_path / "sweep/ladder/ladder.png").read_bytes().startswith(b"\x89PNG")
    assert "E" in (tmp_path / "sweep/ladder/index.html").read_text()
    written = json.loads((tmp_path / "sweep/ladder/ladder.json").read_text())
    assert {"E", "A", "a", "B", "b", "intervals", "held_out", "next"} <= written.keys()
    assert written["E"] == pytest.approx(SMALL.E, rel=0.02)
    assert all(abs(check["error"]) < 0.01 for check in written["held_out"])


def test_runs_on_other_data_are_refused(tmp_path: Path) -> None:
    write_runs(tmp_path / "one")
    write_runs(tmp_path / "other", prepared="def")
    with pytest.raises(ConfigError, match="other data or another tokenizer"):
        scaling.load([tmp_path / "one", tmp_path / "other"])
