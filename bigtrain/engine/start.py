"""The first two things of a rank: join the others, and wrap the model in an engine."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed import distributed_c10d

from bigtrain.config import Config, DeepSpeedConfig
from bigtrain.engine import unpickling
from bigtrain.engine.base import Engine
from bigtrain.models import cpu_bf16
from bigtrain.privacy import Privacy


def init_distributed(device_type: str, timeout_seconds: int) -> torch.device:
    """Join the process group that the launcher's environment describes; return this rank's device."""
    unpickling.restrict()
    device = torch.device(device_type)
    if device_type == "cpu":
        cpu_bf16.enable()
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    set_default_timeout(timeout_seconds)
    torch.distributed.init_process_group(backend)
    return device


def set_default_timeout(seconds: int) -> None:
    """The timeout of every process group that does not ask for another.

    init_process_group's own argument is for the world's group only: the groups that ZeRO (`new_group(ranks)`) and FSDP2
    (its DeviceMesh) make would keep torch's default. All of them look it up in these two names when they are made.
    """
    timeout = datetime.timedelta(seconds=seconds)
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def build(
    config: Config, build_model: Callable[[], nn.Module], device: torch.device, privacy: Privacy | None = None
) -> Engine:
    """The engine that `config.engine` asks for, around the model that `build_model` makes."""
    if privacy is not None:
        from bigtrain.engine.private import PrivateEngine

        return PrivateEngine(config, build_model, device, privacy)
    if isinstance(config.engine, DeepSpeedConfig):
        from bigtrain.engine.deepspeed import DeepSpeedEngine

        built: Engine = DeepSpeedEngine(config, build_model, device)
    else:
        from bigtrain.engine.accelerate import AccelerateEngine

        built = AccelerateEngine(config, build_model, device)
    built.model.in_engine = True  # type: ignore[assignment]  # too late for transforms (transform.py)
    return built
