"""Ranks on several nodes, watched from here through an agent on each: started, stopped, and ended all together.

The checks before the start are in survey.py, the watching in watch_nodes.py; here is what comes between and after: the
config and environment onto every node, and the end of everything on all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bigtrain import checks
from bigtrain.config import Config, dump, held_back
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import write_atomic
from bigtrain.hardware import Placement
from bigtrain.launch import local, nodes
from bigtrain.launch.agent import LEASE_SECONDS
from bigtrain.launch.cause import failure_file, failure_files
from bigtrain.launch.layout import Backend, Layout, rank_environment
from bigtrain.launch.nodes import Node
from bigtrain.launch.run_dir import read_result, readable_errors
from bigtrain.launch.supervise import HELPER_GRACE_SECONDS, Ending, counting_signals, die_with
from bigtrain.launch.survey import connect, facts_of, meet
from bigtrain.launch.watch_nodes import Hangs, gather_failures, pass_on, watch
from bigtrain.provenance import code_sha256, versions
from bigtrain.redact import HELD_BACK, redact


class Launcher:
    """Starts a config on the backend's nodes, as often as restarts want it; `local.run` calls it."""

    def __init__(self, backend: Backend, say: Callable[[str], None]) -> None:
        self.backend, self.say = backend, say
        self.started = 0

    def __call__(self, config: Config, placement: Placement, restarts: int) -> local.Launch:
        self.started += 1
        again = self.started > 1
        least = (config.launch.min_nodes or placement.nodes) if again else placement.nodes
        launch_id = uuid.uuid4().hex
        there = connect(config, self.backend, launch_id, least)
        run_dir = Path(config.run_dir)
        runner: subprocess.Popen[bytes] | None = None
        ending = Ending()
        try:
            with counting_signals(ending):
                there = self._as_many_as_divide(config, placement, there)
                facts = facts_of(config, there, self.say)
                address, port, interfaces = meet(config, there)
                layout = Layout(
                    launch_id, tuple(node.host for node in there), placement.ranks, placement.device, address, port,
                    tuple(interfaces),
                )  # fmt: skip
                shared = all(fact["sees_run_dir"] for fact in facts)
                before = self._prepare(config, placement, there, layout, shared, restarts)
                ending.hosts = {rank: layout.hosts[rank // layout.ranks] for rank in range(layout.world)}
                command, variables = self.backend.command(config, layout)
                runner = subprocess.Popen(
                    command, env=variables, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, start_new_session=True, preexec_fn=die_with(os.getpid()),
                )  # fmt: skip
                words = pass_on(runner, run_dir / "logs" / "launcher.log")
                hangs = Hangs(run_dir, layout.world, config.launch.hang_seconds, there)
                watch(runner, there, ending, config, layout, hangs)
                self._end(there, ending, layout, run_dir, shared)
        finally:
            nodes.close(there)
            if runner is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(runner.pid, signal.SIGKILL)
                runner.wait()
        ending.last_words = redact(words())  # and with it all that the ranks have said is on the terminal
        result = read_result(run_dir) if local.identity(run_dir / "result.json") != before else None
        return local.Launch(ending, result, hangs.past_first_step())

    def _as_many_as_divide(self, config: Config, placement: Placement, there: list[Node]) -> list[Node]:
        """All nodes, or if some are gone the most among which the batch can be shared out."""
        if len(there) == placement.nodes:
            return there
        for count in range(len(there), 0, -1):
            with contextlib.suppress(ConfigError):
                checks.check_batch(config, count * placement.ranks)
                nodes.close(there[count:])
                gone = set(self.backend.hosts()) - {node.host for node in there[:count]}
                self.say(f"going on with {count} of {placement.nodes} nodes, without {', '.join(sorted(gone))}")
                return there[:count]
        raise BigtrainError(f"train.global_batch={config.train.global_batch} cannot be shared out among the nodes left")

    def _prepare(
        self, config: Config, placement: Placement, there: Sequence[Node], layout: Layout, shared: bool, restarts: int
    ) -> tuple[int, int] | None:
        """Config, environment and record, here and on every node. Returns what result.json was before."""
        run_dir, text = Path(config.run_dir), dump(config)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        variables = {
            rank: rank_environment(config, placement, layout, rank) | {
                HELD_BACK: json.dumps(held_back(config)),
                local.RESTARTS: str(restarts),
            }
            for rank in range(layout.world)
        }  # fmt: skip
        with readable_errors(run_dir):
            write_atomic(run_dir / "config.yaml", text)
            write_atomic(run_dir / "config.sha256", f"{sha256}\n")
            (run_dir / "logs").mkdir(exist_ok=True)
            command, _ = self.backend.command(config, layout)
            record = {
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": layout.hosts[0],
                "hosts": layout.hosts,
                "directory": os.getcwd(), "command": command,
                "environment": redact(variables[0], variables[0]) | {HELD_BACK: "***"},
                "placement": {
                    "device": placement.device, "ranks": placement.ranks, "nodes": len(layout.hosts),
                    "threads_per_rank": placement.threads_per_rank,
                },
                "code_sha256": code_sha256(), "versions": versions(),
            }  # fmt: skip
            write_atomic(run_dir / "launch.json", json.dumps(record, indent=1) + "\n")
            for path in failure_files(run_dir):
                path.unlink()

        def own(node: Node) -> dict[str, Any]:
            first = node.number * layout.ranks
            return {"environments": {str(rank): variables[rank] for rank in range(first, first + layout.ranks)}}

        answers = nodes.ask(
            there, "prepare", own, run_dir=str(run_dir), config=text, sha256=sha256, private=config.launch.private,
            files=layout.files, shared=shared, directory=os.getcwd(),
        )  # fmt: skip
        for node, answer in zip(there, answers, strict=True):
            if answer["sha256"] != sha256:
                raise BigtrainError(f"host {node.host}: the config that lies there is not the one that was sent")
        return local.identity(run_dir / "result.json")

    def _end(self, there: Sequence[Node], ending: Ending, layout: Layout, run_dir: Path, shared: bool) -> None:
        """Fetch what a launching side that does not see run_dir needs, say the last lines, and leave no process."""
        reachable = [node for node in there if not node.closed and time.monotonic() - node.heard < LEASE_SECONDS]
        clean = not ending.killed and not ending.launcher_lost and ending.exit_code == 0
        grace = HELPER_GRACE_SECONDS if clean else 0
        for node in reachable:
            node.send("kill", grace=grace)
        left = [node.host for node in reachable if (node.answer("kill", grace + 8) or {"left": 1})["left"]]
        if left:
            self.say(f"warning: processes of the run could not be ended on {', '.join(left)}")
        gather_failures(there, run_dir)
        if not shared and (text := _ask_one(reachable, 0, "read", name="result.json", field="text")):
            write_atomic(run_dir / "result.json", text)
        rank = _failed_rank(ending, run_dir)
        if rank is not None:
            text = _ask_one(reachable, rank // layout.ranks, "tail", rank=rank, field="text")
            if text:
                self.say(
                    f"last lines of {ending.where(rank)}:\n" + "\n".join(f"  {line}" for line in text.splitlines())
                )


def _ask_one(there: Sequence[Node], number: int, order: str, field: str, **arguments: Any) -> str | None:
    for node in there:
        if node.number == number:
            node.send(order, **arguments)
            answer = node.answer(order, 3)
            return answer.get(field) if answer else None
    return None


def _failed_rank(ending: Ending, run_dir: Path) -> int | None:
    """The rank whose last lines say most: the first to report, to end badly, or to hang."""
    if ending.hang is not None:
        return ending.hang.rank
    bad = [rank for rank, code in ending.ranks.items() if code not in (0, None, -signal.SIGTERM)]
    reports = failure_files(run_dir)
    if bad and not failure_file(run_dir, bad[0]).exists():
        return bad[0]
    if reports:
        stamps = {path: json.loads(path.read_text()).get("time", 0.0) for path in reports}
        return int(min(reports, key=stamps.__getitem__).stem.removeprefix("rank-"))
    return bad[0] if bad else None
