"""Before the start: every node is asked what it is and has, and where all can meet. What cannot work ends here."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from bigtrain import hardware
from bigtrain.config import Config
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.hardware import Gpu, Placement
from bigtrain.launch import nodes
from bigtrain.launch.layout import Backend
from bigtrain.launch.nodes import Node
from bigtrain.provenance import code_sha256, differences, versions

REACH_SECONDS = 5.0  # for a node to reach the first one's port


def place(config: Config, backend: Backend, say: Callable[[str], None]) -> Placement:
    """Ask every node what it is and has. Raises ConfigError or BigtrainError for what cannot be used."""
    there = connect(config, backend, uuid.uuid4().hex, len(backend.hosts()))
    try:
        facts = facts_of(config, there, say)
        return _placement(config, backend, [node.host for node in there], facts)
    finally:
        nodes.close(there)


def connect(config: Config, backend: Backend, launch_id: str, least: int) -> list[Node]:
    hosts = backend.hosts()
    there, silent = nodes.connect(hosts, backend.opener(launch_id), config.launch.ssh_seconds)
    if len(there) < least:
        nodes.close(there)
        lack = f", launch.min_nodes={least}" if least < len(hosts) else ""
        raise BigtrainError(f"{len(silent)} of {len(hosts)} hosts cannot be used{lack}: {'; '.join(silent)}")
    return there


def facts_of(config: Config, there: Sequence[Node], say: Callable[[str], None]) -> list[dict[str, Any]]:
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
        old = next((gpu for gpu in fact["gpus"] if gpu["capability"] < [8, 0]), None)
        if device == "cuda" and config.train.precision == "bf16" and old is not None:
            raise ConfigError("train.precision", "bf16", f"{old['name']} on {host} has no bf16", "take fp16 or fp32")
    if device == "cpu" and ranks > hardware.MOST_RANKS_PER_CORE * cores:
        raise ConfigError("launch.ranks", ranks, f"too many for the {cores} cores of a node")
    threads = launch.threads_per_rank or max(1, cores // ranks)
    used = [[_gpu(gpu) for gpu in fact["gpus"][:ranks]] for fact in facts] if device == "cuda" else [[]]
    smallest = min(used, key=lambda gpus: min((gpu.memory_gib for gpu in gpus), default=0.0))
    memory_gib, swap_gib = min((fact["memory_gib"], fact["swap_gib"]) for fact in facts)
    return Placement(device, ranks, threads, tuple(smallest), len(hosts), memory_gib, swap_gib)


def _gpu(fact: dict[str, Any]) -> Gpu:
    return Gpu(**fact | {"capability": tuple(fact["capability"])})


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
