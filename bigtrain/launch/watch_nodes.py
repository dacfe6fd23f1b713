"""While ranks run on other machines: the agents' reports are the eyes, their orders the hands.

A node that says nothing for `agent.LEASE_SECONDS` is lost; its agent kills what is on it by the same rule.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config import Config
from bigtrain.files import write_atomic
from bigtrain.launch.agent import LEASE_SECONDS
from bigtrain.launch.cause import failure_file
from bigtrain.launch.hang import HangDetector
from bigtrain.launch.layout import Layout
from bigtrain.launch.nodes import Node
from bigtrain.launch.supervise import (
    ASKS_TO_STOP,
    FAILURE_GRACE_SECONDS,
    LAUNCHER_GRACE_SECONDS,
    POLL_SECONDS,
    Ending,
)  # fmt: skip

REPORT_LAG_SECONDS = 1.5  # what an agent sees is known here by then
QUIET_SECONDS = 3.0  # without a report: whether that node is lost comes out soon, and till then no rank is blamed
_LAUNCHER_LOG = re.compile(rb"^\[\d{4}-[^]]*\] \[\w+\] \[\w+\.py:")  # deepspeed's launcher speaks of itself on stdout


@dataclass
class _Remote:
    """A rank on another node, as HangDetector wants a process."""

    node: Node
    rank: int
    pid: int
    state: str

    def status(self) -> str:
        return self.state

    def send_signal(self, number: int) -> None:
        self.node.send("signal", number=number, ranks=[self.rank])


class Hangs(HangDetector):
    """Heartbeats as the agents report them."""

    def __init__(self, run_dir: Path, ranks: int, hang_seconds: float, there: Sequence[Node]) -> None:
        self.there = there
        super().__init__(run_dir, ranks, hang_seconds)

    def _read(self, rank: int) -> dict[str, Any] | None:
        for node in self.there:
            if (state := node.state.get(str(rank))) is not None:
                beat = state.get("beat")
                return beat if beat and {"process", "phase", "step"} <= beat.keys() else None
        return None


def watch(
    runner: subprocess.Popen[bytes], there: Sequence[Node], ending: Ending, config: Config, layout: Layout,
    hangs: Hangs,
) -> None:  # fmt: skip
    """The loop of supervise._watch with the agents for eyes and hands."""
    run_dir, launch, world = Path(config.run_dir), config.launch, layout.world
    told: set[int] = set()
    deadline = float("inf")
    runner_ended: float | None = None
    while True:
        status = runner.poll()
        now = time.monotonic()
        came: set[int] = set()
        alive: dict[int, _Remote] = {}
        ends: list[tuple[float, int, int | None]] = []
        failed = False
        for node in there:
            node.ping()
            for name, state in list(node.state.items()):
                rank = int(name)
                failed = failed or state.get("failure") is not None
                if "pid" not in state:
                    continue
                came.add(rank)
                if state.get("ended"):
                    ends.append((node.heard - state["ago"], rank, state["code"]))
                else:
                    alive[rank] = _Remote(node, rank, state["pid"], state.get("status", ""))
        for _, rank, code in sorted(ends, key=lambda end: end[0]):
            ending.ranks.setdefault(rank, code)
        gather_failures(there, run_dir)

        silent = [node for node in there if node.closed or now - node.heard > LEASE_SECONDS]
        if silent and not (len(came) == world and not alive):
            first = min(silent, key=lambda node: node.heard)
            how = "its connection ended" if first.closed else f"no word from it for {now - first.heard:.0f} s"
            ending.lost, ending.killed = f"host {first.host} was lost ({how})", True
            return

        if status is not None and runner_ended is None:
            runner_ended, ending.exit_code = now, status
            ending.signals += -status in ASKS_TO_STOP
        if runner_ended is not None and now - runner_ended > REPORT_LAG_SECONDS:
            if not alive:
                return
            ending.launcher_lost = True
        all_came = len(came) == world
        if runner_ended is not None and all_came and not alive:
            return
        if failed or any(ending.ranks.values()) or (ending.launcher_lost and not all_came):
            deadline = min(deadline, now + FAILURE_GRACE_SECONDS)
        if all_came and not alive:
            deadline = min(deadline, now + LAUNCHER_GRACE_SECONDS)
        if ending.signals or ending.launcher_lost:
            deadline = min(deadline, now + launch.stop_seconds)
            for rank in alive.keys() - told:
                told.add(rank)
                alive[rank].send_signal(signal.SIGTERM)
        if ending.signals > 1 or now >= deadline or (ending.signals and not came):
            ending.killed = bool(alive) or status is None
            return
        if all(now - node.heard < QUIET_SECONDS for node in there):
            ending.hang = hangs.look(alive, set(ending.ranks))
        if ending.hang is not None:
            ending.killed = True
            return
        time.sleep(POLL_SECONDS)


def gather_failures(there: Sequence[Node], run_dir: Path) -> None:
    """What ranks reported, where this side does not see it, into run_dir/failures."""
    for node in there:
        for rank, state in list(node.state.items()):
            path = failure_file(run_dir, rank)
            if state.get("failure") is not None and not path.exists():
                path.parent.mkdir(exist_ok=True)
                write_atomic(path, json.dumps(state["failure"], indent=1))


def pass_on(runner: subprocess.Popen[bytes], log: Path) -> Callable[[], str]:
    """The ranks' words to this terminal, the launcher's own to a log. Returns what gives the launcher's last line."""
    last: list[str] = []
    file = open(log, "ab", buffering=0)  # noqa: SIM115  two threads write to it

    def words() -> None:
        assert runner.stdout is not None
        for line in runner.stdout:
            if _LAUNCHER_LOG.match(line):
                file.write(line)
            else:
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()

    def complaints() -> None:
        assert runner.stderr is not None
        for line in runner.stderr:
            file.write(line)
            if line.strip():
                last.append(line.decode(errors="replace").strip())

    threads = [threading.Thread(target=target, daemon=True) for target in (words, complaints)]
    for thread in threads:
        thread.start()

    def last_words() -> str:
        for thread in threads:
            thread.join(1)
        ours = [line for line in last if "bigtrain: error:" in line]
        return (ours or last or [""])[-1]

    return last_words
