"""Ranks on several nodes, watched from here through an agent on each: started, stopped, and ended all together.

What differs between a hostfile and Slurm is a `Backend`: how an agent is reached and what starts the ranks. Everything
else is here: the checks before the start, the config and environment on every node, and the watching. A node that says
nothing for `agent.LEASE_SECONDS` is lost; its agent kills what is on it by the same rule.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from bigtrain import checks, hardware
from bigtrain.config import Config, dump, held_back
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import write_atomic
from bigtrain.hardware import Placement
from bigtrain.launch import environment, local, nodes
from bigtrain.launch.agent import LEASE_SECONDS, files_folder
from bigtrain.launch.cause import failure_file, failure_files
from bigtrain.launch.hang import HangDetector
from bigtrain.launch.nodes import Node
from bigtrain.launch.run_dir import read_result, readable_errors
from bigtrain.launch.supervise import (
    ASKS_TO_STOP,
    FAILURE_GRACE_SECONDS,
    HELPER_GRACE_SECONDS,
    LAUNCHER_GRACE_SECONDS,
    POLL_SECONDS,
    Ending,
    counting_signals,
    die_with,
)  # fmt: skip
from bigtrain.provenance import code_sha256, differences, versions
from bigtrain.redact import HELD_BACK, redact

REPORT_LAG_SECONDS = 1.5  # what an agent sees is known here by then
REACH_SECONDS = 5.0  # for a node to reach the first one's port
_LAUNCHER_LOG = re.compile(rb"^\[\d{4}-[^]]*\] \[\w+\] \[\w+\.py:")  # deepspeed's launcher speaks of itself on stdout


@dataclass(frozen=True)
class Layout:
    """One launch: who takes part, and where they meet."""

    launch_id: str
    hosts: tuple[str, ...]  # in the order of their ranks
    ranks: int  # per node
    device: Literal["cpu", "cuda"]
    master_address: str
    master_port: int
    interfaces: tuple[str | None, ...]  # each node's, towards the first

    @property
    def files(self) -> str:
        return files_folder(self.launch_id)


class Backend(Protocol):
    def hosts(self) -> list[str]:
        """The nodes that are there to be used."""

    def ranks(self) -> int | None:
        """Per node, if the backend says."""

    def opener(self, launch_id: str) -> Callable[[str, int], Node]:
        """How to reach an agent."""

    def command(self, config: Config, layout: Layout) -> tuple[list[str], dict[str, str]]:
        """What starts the ranks on all nodes, and its whole environment."""


# ------------------------------------------------------------------------------------------- before the start


def place(config: Config, backend: Backend, say: Callable[[str], None]) -> Placement:
    """Ask every node what it is and has. Raises ConfigError or BigtrainError for what cannot be used."""
    there = _connect(config, backend, uuid.uuid4().hex, len(backend.hosts()))
    try:
        facts = _facts(config, there, say)
        return _placement(config, backend, [node.host for node in there], facts)
    finally:
        close(there)


def _connect(config: Config, backend: Backend, launch_id: str, least: int) -> list[Node]:
    hosts = backend.hosts()
    there, silent = nodes.connect(hosts, backend.opener(launch_id), config.launch.ssh_seconds)
    if len(there) < least:
        close(there)
        lack = f", launch.min_nodes={least}" if least < len(hosts) else ""
        raise BigtrainError(f"{len(silent)} of {len(hosts)} hosts cannot be used{lack}: {'; '.join(silent)}")
    return there


def _facts(config: Config, there: Sequence[Node], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What each node says of itself; clocks and versions that are apart end it here."""
    run_dir, token = Path(config.run_dir), f".seen-{uuid.uuid4().hex}"
    paths = [config.data.prepared_dir] if config.data.prepared_dir else []
    if run_dir.is_dir():
        (run_dir / token).touch()
    try:
        before = time.time()
        facts = nodes.ask(there, "facts", run_dir=str(run_dir), paths=paths, token=token)
        after = time.time()
    finally:
        (run_dir / token).unlink(missing_ok=True)
    check_clocks([(node.host, fact["time"]) for node, fact in zip(there, facts, strict=True)], before, after,
                 config.launch.clock_seconds)  # fmt: skip
    mine = {"code": code_sha256()[:12]} | versions()
    table = differences(
        {"this machine": mine}
        | {
            node.host: {"code": fact["code_sha256"][:12]} | fact["versions"]
            for node, fact in zip(there, facts, strict=True)
        }
    )
    if table:
        say(table)
        raise BigtrainError(
            "the nodes do not have the same software (the table above says where): the numbers would not be one run's;"
            " install the same bigtrain environment on each"
        )
    for node, fact in zip(there, facts, strict=True):
        if fact["missing"]:
            raise BigtrainError(
                f"host {node.host}: {fact['missing'][0]} is not there; put data.cache_dir on a filesystem that all"
                " nodes share, or run `bigtrain prepare` with the same config on each node"
            )
        if run_dir.is_dir() and not fact["sees_run_dir"] and config.launch.shared_run_dir:
            raise ConfigError(
                "run_dir", str(run_dir), f"host {node.host} does not see the same directory",
                "name one on a filesystem that all nodes share, or set launch.shared_run_dir=false (no checkpoints)",
            )  # fmt: skip
    return facts


def check_clocks(times: Sequence[tuple[str, float]], before: float, after: float, allowed: float) -> None:
    """Raises BigtrainError if a clock is further than that from the middle one. `before`, `after`: around asking."""
    middle = statistics.median([moment for _, moment in times] + [(before + after) / 2])
    for host, moment in times:
        apart = abs(moment - middle) - (after - before)
        if apart > allowed:
            raise BigtrainError(
                f"host {host}: its clock is {moment - middle:+.0f} s from the others'"
                f" (launch.clock_seconds={allowed:g}); start ntpd or chronyd on it"
            )


def _placement(config: Config, backend: Backend, hosts: Sequence[str], facts: list[dict[str, Any]]) -> Placement:
    launch = config.launch
    gpus = min(len(fact["gpus"]) for fact in facts)
    if launch.device == "cuda":
        for host, fact in zip(hosts, facts, strict=True):
            if not fact["gpus"] or fact["torch_is_cpu_build"]:
                raise ConfigError("launch.device", "cuda", f"host {host} has no GPU that its torch can use")
    usable = gpus and launch.device != "cpu" and not any(fact["torch_is_cpu_build"] for fact in facts)
    device: Literal["cpu", "cuda"] = "cuda" if usable else "cpu"
    cores = min(fact["cores"] for fact in facts)
    ranks = backend.ranks() or launch.ranks or (gpus if device == "cuda" else min(2, cores))
    for host, fact in zip(hosts, facts, strict=True):
        if device == "cuda" and ranks > len(fact["gpus"]):
            raise ConfigError("launch.ranks", ranks, f"host {host} has {len(fact['gpus'])} GPUs")
        if device == "cuda" and config.train.precision == "bf16" and fact["gpus"][0][1] < [8, 0]:
            raise ConfigError(
                "train.precision", "bf16", f"{fact['gpus'][0][0]} on {host} has no bf16", "take fp16 or fp32"
            )
    if device == "cpu" and ranks > hardware.MOST_RANKS_PER_CORE * cores:
        raise ConfigError("launch.ranks", ranks, f"too many for the {cores} cores of a node")
    return Placement(device, ranks, launch.threads_per_rank or max(1, cores // ranks), (), len(hosts))


def meet(config: Config, there: Sequence[Node]) -> tuple[str, int, list[str | None]]:
    """An address and port of the first node that every other reaches, and each node's interface towards it."""
    first, launch = there[0], config.launch
    try:
        (held,) = nodes.ask([first], "listen", port=launch.master_port)
    except BigtrainError as error:
        if launch.master_port is None:
            raise
        raise BigtrainError(
            f"launch.master_port={launch.master_port}: cannot be used on {first.host} ({str(error).split(': ')[-1]});"
            " leave it null for a free one"
        ) from None
    try:
        (fact,) = nodes.ask([first], "facts", run_dir="/", paths=[], token="-")
        wanted = [launch.master_address] if launch.master_address else fact["addresses"]
        if len(there) > 1:  # several nodes on one machine without a network are thinkable
            wanted = [address for address in wanted if not address.startswith("127.")] or wanted
        reached = nodes.ask(there, "reach", addresses=wanted, port=held["port"], seconds=REACH_SECONDS)
    finally:
        nodes.ask([first], "unlisten")
    for address in wanted:
        if all(address in answer["reached"] for answer in reached):
            return address, held["port"], [answer["reached"][address] for answer in reached]
    for node, answer in zip(there, reached, strict=True):
        if not answer["reached"]:
            raise BigtrainError(
                f"host {node.host}: does not reach port {held['port']} of {first.host} at {' or '.join(wanted)};"
                " open it in the firewall, or name launch.master_address and launch.master_port"
            )
    raise BigtrainError(f"no address of {first.host} is reached by all: name launch.master_address")


# ------------------------------------------------------------------------------------------------ one launch


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
        there = _connect(config, self.backend, launch_id, least)
        run_dir = Path(config.run_dir)
        runner: subprocess.Popen[bytes] | None = None
        ending = Ending()
        try:
            with counting_signals(ending):
                there = self._as_many_as_divide(config, placement, there)
                facts = _facts(config, there, self.say)
                address, port, interfaces = meet(config, there)
                layout = Layout(
                    launch_id, tuple(node.host for node in there), placement.ranks, placement.device, address, port,
                    tuple(interfaces),
                )  # fmt: skip
                shared = all(fact["sees_run_dir"] for fact in facts)
                before = self._prepare(config, placement, there, layout, shared, restarts)
                ending.hosts = {rank: layout.hosts[rank // layout.ranks] for rank in range(_world(layout))}
                command, variables = self.backend.command(config, layout)
                runner = subprocess.Popen(
                    command, env=variables, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, start_new_session=True, preexec_fn=die_with(os.getpid()),
                )  # fmt: skip
                words = _pass_on(runner, run_dir / "logs" / "launcher.log")
                hangs = Hangs(run_dir, _world(layout), config.launch.hang_seconds, there)
                _watch(runner, there, ending, config, layout, hangs)
                self._end(there, ending, layout, run_dir, shared)
        finally:
            close(there)
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
                close(there[count:])
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
            for rank in range(_world(layout))
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
        _gather_failures(there, run_dir)
        if not shared and (text := _ask_one(reachable, 0, "read", name="result.json", field="text")):
            write_atomic(run_dir / "result.json", text)
        rank = _failed_rank(ending, run_dir)
        if rank is not None:
            text = _ask_one(reachable, rank // layout.ranks, "tail", rank=rank, field="text")
            if text:
                self.say(
                    f"last lines of {ending.where(rank)}:\n" + "\n".join(f"  {line}" for line in text.splitlines())
                )


def rank_environment(config: Config, placement: Placement, layout: Layout, rank: int) -> dict[str, str]:
    """What one rank is told; its node's agent adds what only the node knows."""
    taken = environment.forwarded(config)
    variables = {
        "DS_ACCELERATOR": placement.device,
        "OMP_NUM_THREADS": str(placement.threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": layout.master_address,
        "MASTER_PORT": str(layout.master_port),
        "LOCAL_RANK": str(rank % layout.ranks),
        "LOCAL_WORLD_SIZE": str(layout.ranks),
        "BIGTRAIN_HOST": layout.hosts[rank // layout.ranks],
    }
    if placement.device == "cuda":
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    else:
        variables["GLIBC_TUNABLES"] = local.KEEP_FREED_MEMORY
    interface = layout.interfaces[rank // layout.ranks]
    if interface is not None:
        variables["GLOO_SOCKET_IFNAME"] = interface
        if placement.device == "cuda" and config.launch.master_address is not None:
            variables["NCCL_SOCKET_IFNAME"] = interface
    return variables | {name: value for name, value in taken.items() if name not in ("DS_ACCELERATOR",)}


def _world(layout: Layout) -> int:
    return len(layout.hosts) * layout.ranks


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


def close(there: Sequence[Node]) -> None:
    closers = [threading.Thread(target=node.close) for node in there]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()


# -------------------------------------------------------------------------------------------------- watching


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


def _watch(
    runner: subprocess.Popen[bytes], there: Sequence[Node], ending: Ending, config: Config, layout: Layout,
    hangs: Hangs,
) -> None:  # fmt: skip
    """The loop of supervise._watch with the agents for eyes and hands."""
    run_dir, launch, world = Path(config.run_dir), config.launch, _world(layout)
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
        _gather_failures(there, run_dir)

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
        ending.hang = hangs.look(alive, set(ending.ranks))
        if ending.hang is not None:
            ending.killed = True
            return
        time.sleep(POLL_SECONDS)


def _gather_failures(there: Sequence[Node], run_dir: Path) -> None:
    """What ranks reported, where this side does not see it, into run_dir/failures."""
    for node in there:
        for rank, state in list(node.state.items()):
            path = failure_file(run_dir, rank)
            if state.get("failure") is not None and not path.exists():
                path.parent.mkdir(exist_ok=True)
                write_atomic(path, json.dumps(state["failure"], indent=1))


def _pass_on(runner: subprocess.Popen[bytes], log: Path) -> Callable[[], str]:
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
