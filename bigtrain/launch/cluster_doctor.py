"""`bigtrain doctor --launch hostfile|slurm`: every node of a cluster, and the network between each two of them."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from bigtrain.config import Config
from bigtrain.errors import BigtrainError
from bigtrain.launch import bandwidth, nodes, survey
from bigtrain.launch.layout import Backend
from bigtrain.launch.nodes import Node
from bigtrain.provenance import code_sha256, differences, versions

EXAMINE_SECONDS = 90.0  # to import torch and deepspeed on a busy node and try a compiler


def examine(config: Config, backend: Backend, cluster_file: Path | None, say: Callable[[str], None]) -> bool:
    """Say what each node has and measure the network. Returns whether a run could start on them.

    `cluster_file`: what was measured goes into it, beside what `bigtrain doctor --cluster-file` found of one node.
    """
    hosts, launch_id = backend.hosts(), uuid.uuid4().hex
    there, silent = nodes.connect(hosts, backend.opener(launch_id), config.launch.ssh_seconds)
    try:
        good = not silent
        facts: list[dict[str, Any]] = []
        if there:
            before = time.time()
            facts = nodes.ask(there, "facts", run_dir=str(Path.cwd()), paths=[], token="-")
            after = time.time()
            say(_table([node.host for node in there], facts))
            made = {"this machine": {"code": code_sha256()[:12]} | versions()} | {
                node.host: {"code": fact["code_sha256"][:12]} | fact["versions"]
                for node, fact in zip(there, facts, strict=True)
            }
            if table := differences(made):
                say(f"missing: the nodes do not have the same software\n{table}")
                good = False
            try:
                times = [(node.host, fact["time"]) for node, fact in zip(there, facts, strict=True)]
                survey.check_clocks(times, before, after, config.launch.clock_seconds)
            except BigtrainError as error:
                say(f"missing: {error}")
                good = False
        for line in silent:
            say(f"missing: {line}")
        for line in _examined(there, facts):
            say(line)
        measured, problems = _pairs(config, there, facts)
        for line in problems:
            say(f"missing: {line}")
        for (first, second), found in measured.items():
            say(f"{first} - {second}: {found['gb_per_second']:.3g} GB/s, {found['latency_us']:.0f} us (all-reduce)")
        if cluster_file is not None and measured:
            _write(cluster_file, len(there), measured)
            say(str(cluster_file))
        return good and not problems
    finally:
        nodes.close(there)


def _examined(there: Sequence[Node], facts: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with each node's GPUs, and which of DeepSpeed's native ops it can build."""
    device = _device(facts)
    nodes.ask(there, "examine", device=device)
    limit, found = time.monotonic() + EXAMINE_SECONDS, []
    for node in there:
        answer = nodes.answer_of(node, "examine_done", there, limit) or {"error": "no answer"}
        if "error" in answer:
            found.append(f"note: {node.host}: its GPUs and native ops are not known: {answer['error']}")
            continue
        found += [f"note: {node.host}: {line}" for line in answer["gpu_problems"]]
        states = ", ".join(f"{name} {state}" for name, state in answer["ops"].items())
        found.append(f"{node.host}: native ops: {states}")
    return found


def _device(facts: Sequence[dict[str, Any]]) -> str:
    return "cuda" if facts and all(fact["gpus"] and not fact["torch_is_cpu_build"] for fact in facts) else "cpu"


def _table(hosts: Sequence[str], facts: Sequence[dict[str, Any]]) -> str:
    rows = [["host", "cores", "memory", "GPUs", "disk here", "C++", "/dev/shm"]]
    for host, fact in zip(hosts, facts, strict=True):
        names = sorted({gpu["name"] for gpu in fact["gpus"]})
        gpus = f"{len(fact['gpus'])} x {', '.join(names)}" if names else "none"
        rows.append([
            host, str(fact["cores"]), f"{fact['memory_gib']:.0f} GiB", gpus, f"{fact['disk_gib']:.0f} GiB free",
            "yes" if fact["compiler"] else "missing", f"{fact['shared_memory_gib']:.1f} GiB free",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _pairs(
    config: Config, there: Sequence[Node], facts: Sequence[dict[str, Any]]
) -> tuple[dict[tuple[str, str], dict[str, float]], list[str]]:
    """What each two nodes measure together, a pair at a time so that none slows another's."""
    device = _device(facts)
    measured: dict[tuple[str, str], dict[str, float]] = {}
    problems = []
    for first, second in itertools.combinations(there, 2):
        pair = (first, second)
        try:
            address, port, interfaces = survey.meet(config, pair)
            common = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": "2", "DS_ACCELERATOR": device}
            ways = dict(zip(pair, interfaces, strict=True))
            nodes.ask(pair, "bandwidth", lambda node, common=common, ways=ways, first=first: {
                "environment": common | {"RANK": str(int(node is not first))}
                | ({"GLOO_SOCKET_IFNAME": ways[node]} if ways[node] else {})
            })  # type: ignore[misc]  # fmt: skip
            found = _results(pair, there)
        except BigtrainError as error:
            problems.append(f"{first.host} - {second.host}: {error}")
            continue
        measured[first.host, second.host] = found
    return measured, problems


def _results(pair: Sequence[Node], there: Sequence[Node]) -> dict[str, float]:
    limit = time.monotonic() + bandwidth.TIMEOUT_SECONDS
    found: dict[str, float] = {}
    for node in pair:
        if (answer := nodes.answer_of(node, "bandwidth_done", there, limit)) is None:
            raise BigtrainError(f"no result from {node.host}")
        if "error" in answer:
            raise BigtrainError(f"{node.host}: {answer['error']}")
        found = answer
    return {name: float(found[name]) for name in ("gb_per_second", "latency_us")}


def _write(path: Path, count: int, measured: dict[tuple[str, str], dict[str, float]]) -> None:
    """The slowest pair is what a collective over all waits for. What else the file has stays."""
    data: dict[str, Any] = {}
    if path.exists():
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    slowest = min(found["gb_per_second"] for found in measured.values())
    latency = max(found["latency_us"] for found in measured.values())
    data |= {
        "nodes": count,
        "inter_node_gb_per_second": round(slowest, 4),
        "inter_node_latency_us": round(latency, 1),
    }
    source = {"inter_node_gb_per_second": "measured: all-reduce between each two nodes, the slowest pair",
              "inter_node_latency_us": "measured: all-reduce of 4 bytes, the slowest pair"}  # fmt: skip
    data["source"] = (data.get("source") or {}) | source
    try:
        path.write_text(yaml.safe_dump(data, sort_keys=False, width=120), encoding="utf-8")
    except OSError as error:
        raise BigtrainError(f"{path}: cannot be written ({error.strerror})") from None
