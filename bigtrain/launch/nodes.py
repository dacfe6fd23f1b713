"""The launching side of the agents: one connection (ssh or srun) to each node, all asked at once."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from bigtrain.config import LaunchConfig
from bigtrain.errors import BigtrainError

AGENT = "bigtrain.launch.agent"
PING_SECONDS = 1.0
ANSWER_SECONDS = 30.0  # for an agent that is there: it looks at packages, GPUs and disks


class Node:
    """One connection. What the agent says is read by a thread, so that nobody waits for a node that is silent."""

    def __init__(self, host: str, number: int, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.host, self.number = host, number
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env=environment,
        )  # fmt: skip
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self.heard = time.monotonic()
        self.pinged = 0.0
        self.state: dict[str, Any] = {}  # the agent's last report on its ranks
        self.answers: deque[dict[str, Any]] = deque()
        self.errors: deque[str] = deque(maxlen=20)
        self.closed = False  # the connection ended
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=target, daemon=True) for target in (self._read_answers, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()

    def _read_answers(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # a banner of the login shell
                continue
            with self._news:
                self.heard = time.monotonic()
                if "state" in message:
                    self.state = message["state"]
                elif "answer" in message:
                    self.answers.append(message)
                self._news.notify_all()
        with self._news:
            self.closed = True
            self._news.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line.decode(errors="replace").rstrip())

    def send(self, order: str, **arguments: Any) -> None:
        """Never waits long for a node that does not read."""
        assert self.process.stdin is not None
        data = json.dumps({"do": order} | arguments).encode() + b"\n"
        limit = time.monotonic() + 5
        while data and time.monotonic() < limit:
            try:
                data = data[os.write(self.process.stdin.fileno(), data) :]
            except BlockingIOError:
                select.select([], [self.process.stdin], [], 0.2)
            except (OSError, ValueError):
                return

    def ping(self) -> None:
        now = time.monotonic()
        if now - self.pinged >= PING_SECONDS:
            self.pinged = now
            self.send("ping")

    def answer(self, name: str, seconds: float) -> dict[str, Any] | None:
        """The next answer of that name; None if the connection ended or the time is over."""
        limit = time.monotonic() + seconds
        with self._news:
            while True:
                for message in list(self.answers):
                    if message["answer"] == name:
                        self.answers.remove(message)
                        return message
                left = limit - time.monotonic()
                if self.closed or left <= 0:
                    return None
                self._news.wait(min(left, 0.5))
            return None

    def problem(self) -> str:
        """Why there is no connection, in the words of ssh or of the Python at the other end."""
        if self.closed:
            self._readers[1].join(1)
        noise = ("Warning: Permanently added", "Connection to", "debug1:", "Traceback", "  File")
        lines = [line for line in self.errors if line.strip() and not line.startswith(noise)]
        return lines[-1] if lines else "it does not answer"

    def close(self) -> None:
        """Let the agent end; then the connection, whatever its state."""
        if not self.closed:
            self.send("end")
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def ssh_options(launch: LaunchConfig) -> list[str]:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={launch.ssh_seconds}", "-o", "ServerAliveInterval=5",
               "-o", "ServerAliveCountMax=2"]  # fmt: skip
    if launch.ssh_config is not None:
        options += ["-F", launch.ssh_config]
    if launch.ssh_port is not None:
        options += ["-p", str(launch.ssh_port)]
    return options


def agent_command(launch_id: str) -> list[str]:
    return [sys.executable, "-m", AGENT, launch_id]


def over_ssh(launch: LaunchConfig, launch_id: str) -> Callable[[str, int], Node]:
    """How to reach a host: its agent runs this same Python in this same directory, as the deepspeed launcher does."""
    path = os.environ.get("PYTHONPATH")
    words = ["env", f"PYTHONPATH={path}"] if path else []
    directory = shlex.quote(os.getcwd())
    remote = f"cd {directory} && exec {shlex.join([*words, *agent_command(launch_id)])}"

    def open_node(host: str, number: int) -> Node:
        return Node(host, number, ["ssh", "-T", *ssh_options(launch), host, remote])

    return open_node


def connect(
    hosts: Sequence[str], open_node: Callable[[str, int], Node], seconds: float
) -> tuple[list[Node], list[str]]:
    """The nodes that answer within so many seconds, and for each other host `host: why not`."""
    nodes = [open_node(host, number) for number, host in enumerate(hosts)]
    limit = time.monotonic() + seconds
    there, silent = [], []
    for node in nodes:
        if node.answer("here", max(0.1, limit - time.monotonic())) is None:
            silent.append(f"{node.host}: {node.problem()}")
            node.process.kill()
            node.close()
        else:
            there.append(node)
    for number, node in enumerate(there):
        node.number = number
    return there, silent


def ask(nodes: Sequence[Node], order: str, each: Callable[[Node], dict[str, Any]] = lambda node: {}, **same: Any) -> (
    list[dict[str, Any]]
):  # fmt: skip
    """One question to all nodes at once; their answers in order. Raises BigtrainError naming a host that fails."""
    for node in nodes:
        node.send(order, **same, **each(node))
    limit = time.monotonic() + ANSWER_SECONDS
    answers = []
    for node in nodes:
        if (answer := answer_of(node, order, nodes, limit)) is None:
            raise BigtrainError(f"host {node.host}: {node.problem()}")
        if "error" in answer:
            raise BigtrainError(f"host {node.host}: {answer['error']}")
        answers.append(answer)
    return answers


def answer_of(node: Node, name: str, alive: Sequence[Node], limit: float) -> dict[str, Any] | None:
    """The node's answer of that name, with all of `alive` kept alive meanwhile; None if the connection has ended or
    `limit`, on the monotonic clock, is over."""
    while (answer := node.answer(name, 0.5)) is None:
        for each in alive:
            each.ping()
        if node.closed or time.monotonic() > limit:
            return None
    return answer


def close(there: Sequence[Node]) -> None:
    closers = [threading.Thread(target=node.close) for node in there]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
