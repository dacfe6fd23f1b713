"""Which of several failures is named as the cause. The same with real ranks is in test_local.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.launch.cause import first_cause
from bigtrain.launch.supervise import Ending

LOST = "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:1234"


def report(run: Path, rank: int, time: float, error: str, expected: bool = False) -> None:
    (run / "failures").mkdir(exist_ok=True)
    failure = {"rank": rank, "time": time, "error": error, "expected": expected}
    (run / "failures" / f"rank-{rank}.json").write_text(json.dumps(failure))


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (Ending(exit_code=1, ranks={1: -9, 0: 1}), "rank 1 was killed by SIGKILL"),
        (Ending(exit_code=247, ranks={1: None, 0: 1}), "rank 1 was killed by SIGKILL"),  # told by the launcher
        (Ending(exit_code=1, ranks={1: None, 0: 1}), "rank 1 was killed before"),  # nobody saw how
        (Ending(exit_code=1, ranks={1: -7, 0: 1}), "is /dev/shm full?"),
        (Ending(exit_code=1, ranks={0: 1, 1: -15}), "rank 0 failed"),  # rank 1 was only told to go
        (Ending(exit_code=1, ranks={0: 1, 1: None}), "rank 0 failed"),
    ],
)
def test_a_killed_rank_is_the_cause_and_what_its_peers_report_an_echo(
    tmp_path: Path, ending: Ending, said: str
) -> None:
    report(tmp_path, 0, 5.0, LOST)
    assert said in first_cause(tmp_path, ending).line


def test_of_several_reports_the_first_is_named(tmp_path: Path) -> None:
    report(tmp_path, 0, 5.0, LOST)
    report(tmp_path, 1, 4.0, "ValueError: no such shard")
    said = first_cause(tmp_path, Ending(exit_code=1, ranks={0: 1, 1: 1})).line
    assert said.startswith("rank 1 failed before the first step: ValueError: no such shard; traceback in ")


def test_an_error_of_our_own_speaks_for_itself(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    report(tmp_path, 1, 4.0, "loss is nan at step 7", expected=True)
    cause = first_cause(tmp_path, Ending(exit_code=1, ranks={1: 1, 0: 1}))
    assert (cause.line, cause.users) == ("loss is nan at step 7", True)


def test_without_any_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    assert "rank 1 ended with exit status 3 after step 7" in first_cause(tmp_path, Ending(3, {1: 3, 0: 0})).line
    assert "launcher was killed after step 7" in first_cause(tmp_path, Ending(0, {0: 0, 1: 0}, launcher_lost=True)).line
    assert "launcher was killed" in first_cause(tmp_path, Ending(0, {0: -9, 1: -9})).line  # the ranks go with it
    assert "rank 0 was killed" in first_cause(tmp_path, Ending(247, {0: -9})).line
    assert "exit status 4 before any rank started" in first_cause(tmp_path, Ending(4)).line
