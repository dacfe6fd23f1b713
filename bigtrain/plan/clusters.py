"""The machines that a run is planned for: presets in conf/cluster, any number of their devices, or a file of one's own.

A preset describes one node; `h100x64` is its 64 devices. Peak rates are of dense matrices, as data sheets give them
(without their factor 2 for sparsity); bandwidths are of one device and one direction. Where each number comes from
stands in the file beside it, under `source`.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from bigtrain import config as schema
from bigtrain import hardware
from bigtrain.config import LaunchConfig
from bigtrain.errors import NO_VALUE, ConfigError, nearest, unknown_key
from bigtrain.hardware import Placement

DTYPES = ("fp32", "bf16", "fp16", "fp8")


@dataclass(frozen=True)
class Device:
    """One accelerator, or of a CPU machine the share of it that one rank gets."""

    name: str
    memory_gib: float  # that the driver shows, less than the data sheet's GB
    peak_tflops: dict[str, float]  # dtype -> TFLOP/s; one that is missing runs as the next wider one
    memory_gb_per_second: float
    watts: float  # at full load
    context_gib: float = 0.0  # driver, libraries and communication buffers: outside what torch allocates
    block_mib: float = 0.0  # what the allocator reserves a large block in multiples of; 0: it does not
    # What `bigtrain doctor` measured of plan/efficiency.py's fractions, by their names; the others are assumed.
    efficiency: dict[str, float] = field(default_factory=dict)

    def tflops(self, precision: str) -> float:
        """Peak of bf16, fp16, fp32 or fp8."""
        return self.peak_tflops.get(precision) or self.peak_tflops.get("bf16") or self.peak_tflops["fp32"]

    @property
    def is_cpu(self) -> bool:
        """Whether the device's memory is the host's."""
        return self.name.lower().startswith("cpu")


@dataclass(frozen=True)
class Cluster:
    name: str
    device: Device
    devices_per_node: int
    intra_node_gb_per_second: float  # between two devices of a node
    inter_node_gb_per_second: float  # of the network, for each device
    host_memory_gib: float  # of a node
    host_link_gb_per_second: float  # between a device and its host (PCIe)
    disk_gb_per_second: float  # of a node, for all its devices together
    disk_gib: float
    price_per_device_hour: float  # US dollars
    nodes: int = 1
    intra_node_latency_us: float = 5.0  # of one hop of a collective
    inter_node_latency_us: float = 10.0
    pue: float = 1.1  # energy of the data centre for each unit that the devices take
    kg_co2_per_kwh: float = 0.385
    source: dict[str, str] = field(default_factory=dict)  # field -> where its number is from

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def resized(self, devices: int) -> Cluster:
        """The same machines with so many devices: part of one node, or whole nodes.

        Raises ConfigError for a number that is neither.
        """
        per_node = self.devices_per_node
        if devices < 1:
            raise ConfigError("cluster", f"{self.name}x{devices}", "at least one device is needed")
        if devices <= per_node:
            return replace(self, devices_per_node=devices, nodes=1)
        if devices % per_node:
            below = devices - devices % per_node
            raise ConfigError(
                "cluster", f"{self.name}x{devices}", f"a node has {per_node} devices",
                f"take {self.name}x{below} or {self.name}x{below + per_node}",
            )  # fmt: skip
        return replace(self, nodes=devices // per_node)


def presets() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """Inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "conf" / "cluster"
    return inside if inside.is_dir() else package.parent / "conf" / "cluster"


def find(selector: str) -> Cluster:
    """The cluster that `cluster=` names: NAME (one node), NAMExDEVICES, or a file, FILE.yaml or FILE.yamlxDEVICES.

    Raises ConfigError.
    """
    if match := re.search(r"x(\d{10,})$", selector):
        raise ConfigError("cluster", selector, f"{len(match[1])} digits of devices", "take fewer than 1,000,000,000")
    match = re.fullmatch(r"(.+\.ya?ml)(?:x(\d+))?", selector)
    if match:
        path = Path(match[1]).expanduser()
        if not path.is_file():
            raise ConfigError("cluster", selector, "no such file", "bigtrain doctor --cluster-file FILE writes one")
        cluster = read(path)
        return cluster.resized(int(match[2])) if match[2] else cluster
    known = presets()
    if selector in known:
        return read(_folder() / f"{selector}.yaml")
    name, _, count = selector.rpartition("x")
    if count.isdigit():
        for preset in (name, f"{name}x"):  # mi300x8 means mi300xx8
            if preset in known:
                return read(_folder() / f"{preset}.yaml").resized(int(count))
    near = nearest(name if count.isdigit() else selector, known)
    way_out = f"did you mean {near}?" if near else f"one of {', '.join(known)}, with xN for N devices, or a yaml file"
    raise ConfigError("cluster", selector, "unknown", way_out)


def read(path: Path) -> Cluster:
    """A cluster file. Raises ConfigError naming the file and the field that is missing, unknown or no good."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("cluster", str(path), f"cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise ConfigError("cluster", str(path), "holds no cluster", "copy one of bigtrain's conf/cluster")
    for cls, given, prefix in ((Cluster, {"name": path.stem} | data, ""), (Device, data.get("device"), "device.")):
        for each in fields(cls):
            needed = each.default is MISSING and each.default_factory is MISSING
            if needed and each.name not in (given if isinstance(given, dict) else {}):
                raise ConfigError(f"{path.name}: {prefix}{each.name}", NO_VALUE, "missing", f"add it to {path}")
    cluster = schema.section(Cluster, {"name": path.stem} | data, path.name)
    _check(asdict(cluster), path.name)
    peaks = cluster.device.peak_tflops
    if wrong := set(peaks) - set(DTYPES):
        raise unknown_key(f"{path.name}.device.peak_tflops.{min(wrong)}", DTYPES)
    if "fp32" not in peaks:
        raise ConfigError(f"{path.name}.device.peak_tflops.fp32", NO_VALUE, "missing", f"add it to {path}")
    return cluster


def _check(values: dict[str, Any], prefix: str) -> None:
    """Raises ConfigError for a number that is not positive, where it has to be."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check(value, f"{prefix}.{key}")
        elif isinstance(value, (int, float)) and not 0 < value < float("inf"):
            if key not in _MAY_BE_ZERO:
                raise ConfigError(f"{prefix}.{key}", value, "must be above 0")
            if value != 0:
                raise ConfigError(f"{prefix}.{key}", value, "must be at least 0")


_MAY_BE_ZERO = ("context_gib", "block_mib", "price_per_device_hour", "kg_co2_per_kwh", "intra_node_latency_us",
                "inter_node_latency_us")  # fmt: skip


def here(launch: LaunchConfig) -> Cluster:
    """This machine, as far as can be told without measuring, with the ranks that `train` would start.

    Raises ConfigError as hardware.place does.
    """
    return of(hardware.place(launch))


def of(placement: Placement) -> Cluster:
    """The nodes that `placement` found, each taken as the smallest; of unknown memory, as this machine."""
    host_gib = placement.memory_gib or hardware.memory_bytes() / 2**30
    if placement.gpus:
        gpu = placement.gpus[0]
        match = next((preset for mark, preset in _GPUS if mark in gpu.name), None)
        alike = read(_folder() / f"{match or 'a100_40gb'}.yaml")
        device = replace(alike.device, name=gpu.name, memory_gib=min(each.memory_gib for each in placement.gpus))
    else:
        alike = read(_folder() / "laptop.yaml")
        device = replace(alike.device, memory_gib=host_gib / placement.ranks)
    return replace(
        alike, name="this machine" if placement.nodes == 1 else "these nodes", device=device,
        devices_per_node=placement.ranks, host_memory_gib=host_gib, nodes=placement.nodes,
    )  # fmt: skip


_GPUS = (("B200", "b200"), ("H200", "h200"), ("H100", "h100"), ("A100-SXM4-80", "a100_80gb"),
         ("A100 80", "a100_80gb"), ("A100-SXM-80", "a100_80gb"), ("A100", "a100_40gb"))  # fmt: skip
