"""Why a launch failed, in one line: of all that went wrong the cause, not its echoes."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain.launch.hang import describe
from bigtrain.launch.run_dir import last_step
from bigtrain.launch.supervise import Ending

FAILURES = "failures"  # in the run directory: rank-N.json, as the worker leaves it
_CONTINUES = "the same run_dir continues from the last checkpoint"
# Errors of the connections between ranks: a port that was taken meanwhile, a host that could not be reached.
_NETWORK = ("DistNetworkError", "DistStoreError", "DistBackendError", "Connection", "TimeoutError", "gloo", "NCCL")


@dataclass(frozen=True)
class Cause:
    text: str
    what: str  # the same whenever the same happens again: no step, no path
    way_out: str = ""
    users: bool = False  # a BigtrainError: the user has to act, starting again would not help
    reported: bool = False  # an exception in a rank, other than one of the network's

    @property
    def line(self) -> str:
        return f"{self.text}; {self.way_out}" if self.way_out else self.text


def first_cause(run_dir: Path, ending: Ending) -> Cause:
    """The failure that came first; the others are its echo.

    A rank that hung or that a signal killed says nothing itself, while its peers report lost connections: so these go
    first, then what a rank reported, then a bare exit status. SIGTERM is how the launcher ends the peers.
    """
    step = last_step(run_dir)
    at = f" after step {step}" if step else " before the first step"
    if ending.hang is not None:
        hang = replace(ending.hang, step=max(ending.hang.step, step or 0))  # heartbeats are written twice a second
        return Cause(
            describe(hang, ending.where(hang.rank)),
            f"rank {hang.rank} hung ({hang.phase})",
            f"stacks of all ranks in {run_dir}/logs/; if it only needs longer, raise launch.hang_seconds",
        )
    if ending.lost is not None:
        return Cause(f"{ending.lost}{at}", ending.lost, _CONTINUES)
    codes = list(ending.ranks.values())
    # A killed launcher takes the ranks with it; where it had a parent (`deepspeed` itself), that one reports success.
    gone = ending.exit_code == -signal.SIGKILL or (codes and ending.exit_code == 0 and _all_killed(codes))
    if ending.launcher_lost or (gone and not ending.killed):
        return Cause(
            f"the deepspeed launcher was killed{at}; the ranks were ended", "the deepspeed launcher was killed"
        )
    killed = [
        (rank, -code) for rank, code in ending.ranks.items()
        if code is not None and code < 0 and code != -signal.SIGTERM and not failure_file(run_dir, rank).exists()
    ]  # fmt: skip
    if not killed and 128 < ending.exit_code < 256:  # the launcher passes a rank's -9 on as 247
        unseen = [rank for rank, code in ending.ranks.items() if code is None]
        number = 256 - ending.exit_code
        if unseen and number in {*signal.Signals} and number != signal.SIGTERM:
            killed = [(unseen[0], number)]
    if killed:
        rank, number = killed[0]
        return _killed(run_dir, ending, rank, f" by {_signal_name(number)}", at, number)
    failures = sorted(_read_failures(run_dir), key=lambda failure: failure.get("time", 0.0))
    rank, code = next(iter(ending.ranks.items()), (0, 0))  # the first to end
    if failures and code is None and not failure_file(run_dir, rank).exists():
        # The launcher took its exit status before we saw it; what the others report is an echo.
        return _killed(run_dir, ending, rank, "", at, signal.SIGKILL)
    if failures:
        first = failures[0]
        error = str(first.get("error"))
        if first.get("expected"):
            return Cause(error, error, users=True)
        return Cause(
            f"{ending.where(first['rank'])} failed{at}: {error}",
            f"rank {first['rank']} failed: {error}",
            f"traceback in {failure_file(run_dir, first['rank'])}",
            reported=not any(word in error for word in _NETWORK),
        )
    for rank, code in ending.ranks.items():
        if code:
            what = f"{ending.where(rank)} ended with {_signal_name(-code) if code < 0 else f'exit status {code}'}"
            return Cause(f"{what}{at}", what, f"last lines in {run_dir}/logs/rank-{rank}.log")
    if not ending.ranks:
        said = f" ({ending.last_words})" if ending.last_words else ""
        what = f"the launcher ended with exit status {ending.exit_code} before any rank started{said}"
        return Cause(what, what, reported=True)
    return Cause(f"the ranks ended without a result{at}", "no result", f"last lines in {run_dir}/logs/")


def _all_killed(codes: list[int | None]) -> bool:
    return all(code in (None, -signal.SIGKILL) for code in codes) and -signal.SIGKILL in codes


def _killed(run_dir: Path, ending: Ending, rank: int, by: str, at: str, number: int) -> Cause:
    return Cause(
        f"{ending.where(rank)} was killed{by}{at}{_guess(number)}",
        f"rank {rank} was killed{by}",
        f"last lines in {run_dir}/logs/rank-{rank}.log; {_CONTINUES}",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _guess(number: int) -> str:
    if number == signal.SIGKILL:
        return " (out of memory? see dmesg)"
    if number == signal.SIGBUS:
        return " (is /dev/shm full?)"
    return ""


def failure_file(run_dir: Path, rank: object) -> Path:
    return run_dir / FAILURES / f"rank-{rank}.json"


def failure_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FAILURES).glob("rank-*.json"))


def _read_failures(run_dir: Path) -> list[dict[str, Any]]:
    failures = []
    for path in failure_files(run_dir):
        try:
            failure = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            failure = {"rank": path.stem.removeprefix("rank-"), "error": "its report cannot be read"}
        failures.append(failure)
    return failures
