"""One launch across machines: who takes part, where they meet, what each rank is told; and what a backend has to know.

What differs between a hostfile and Slurm is a `Backend`: how an agent is reached and what starts the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from bigtrain.config import Config
from bigtrain.hardware import Placement
from bigtrain.launch import environment, local
from bigtrain.launch.agent import files_folder
from bigtrain.launch.nodes import Node


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

    @property
    def world(self) -> int:
        return len(self.hosts) * self.ranks


class Backend(Protocol):
    def hosts(self) -> list[str]:
        """The nodes that are there to be used."""

    def ranks(self) -> int | None:
        """Per node, if the backend says."""

    def opener(self, launch_id: str) -> Callable[[str, int], Node]:
        """How to reach an agent."""

    def command(self, config: Config, layout: Layout) -> tuple[list[str], dict[str, str]]:
        """What starts the ranks on all nodes, and its whole environment."""


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
        variables["GLIBC_TUNABLES"] = local.heap_settings(config)
    interface = layout.interfaces[rank // layout.ranks]
    if interface is not None:
        variables["GLOO_SOCKET_IFNAME"] = interface
        if placement.device == "cuda" and config.launch.master_address is not None:
            variables["NCCL_SOCKET_IFNAME"] = interface
    return variables | {name: value for name, value in taken.items() if name not in ("DS_ACCELERATOR",)}
