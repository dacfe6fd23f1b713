"""The ways in which a run's ranks come to life, by `launch.kind`: where they run, how to start them, how to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from bigtrain import hardware
from bigtrain.config import Config, LaunchConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.hardware import Placement
from bigtrain.launch import dryrun, local


class Way(Protocol):
    placement: Placement

    def run(self, config: Config) -> tuple[dict[str, Any], bool] | None:
        """Start the ranks and see them to their end, as `local.run` says it. None: others will start them."""

    def show(self, config: Config) -> str:
        """What `run` would start."""


def way(config: Config, say: Callable[[str], None], shown_only: bool) -> Way:
    """Look where the ranks would run. Raises ConfigError or BigtrainError where they cannot.

    `shown_only`: nothing but this machine's own files is asked.
    """
    if config.launch.kind == "hostfile":
        from bigtrain.launch.hostfile import Hostfile

        return Hostfile(config, say, shown_only)
    if config.launch.kind == "slurm":
        from bigtrain.launch.slurm import Slurm

        return Slurm(config, say, shown_only)
    if config.launch.kind in ("torchrun", "manual", "kubernetes"):
        from bigtrain.launch.manual import Manual

        return Manual(config, say)
    return Local(config, say)


def resolved(config: Config, placement: Placement) -> Config:
    """`config` with what `placement` decided filled in, for the ranks to read."""
    launch = replace(
        config.launch, device=placement.device, ranks=placement.ranks, threads_per_rank=placement.threads_per_rank
    )
    if placement.nodes > 1:
        launch = replace(launch, nodes=placement.nodes)
    return replace(config, launch=launch)


class Local:
    """Ranks on this machine."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.say = say
        self.placement = hardware.place(config.launch)
        if config.launch.master_port is not None:
            local.check_port(config.launch.master_port)

    def run(self, config: Config) -> tuple[dict[str, Any], bool]:
        return local.run(config, self.placement, self.say)

    def show(self, config: Config) -> str:
        return dryrun.show(config, self.placement)


def examine_cluster(
    kind: str, hostfile: str | None, ssh_config: str | None, cluster_file: Path | None, say: Callable[[str], None]
) -> bool:
    """`bigtrain doctor --launch`: the nodes of a hostfile, or of the Slurm allocation that this runs in."""
    from bigtrain.launch import cluster_doctor, slurm
    from bigtrain.launch.hostfile import HostfileBackend
    from bigtrain.launch.layout import Backend

    backend: Backend
    if kind == "hostfile":
        if hostfile is None:
            raise ConfigError(
                "--hostfile", None, "--launch hostfile wants one", "a file with a line `host slots=N` each"
            )
        launch = LaunchConfig(kind="hostfile", hostfile=hostfile, ssh_config=ssh_config)
        backend = HostfileBackend(launch)
        backend.check()
    else:
        if not slurm.inside():
            raise BigtrainError("--launch slurm is for inside an allocation: salloc --nodes=N bigtrain doctor ...")
        launch = LaunchConfig(kind="slurm")
        backend = slurm.SlurmBackend(launch)
    return cluster_doctor.examine(Config(launch=launch), backend, cluster_file, say)
