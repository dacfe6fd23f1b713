"""The first two things of a rank: join the others, and wrap the model in an engine."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

import torch
from torch import nn

from bigtrain.config import Config, DeepSpeedConfig
from bigtrain.engine import unpickling
from bigtrain.engine.base import Engine
from bigtrain.models import cpu_bf16


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
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    return device


def build(config: Config, build_model: Callable[[], nn.Module], device: torch.device) -> Engine:
    """The engine that `config.engine` asks for, around the model that `build_model` makes."""
    if isinstance(config.engine, DeepSpeedConfig):
        from bigtrain.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, build_model, device)
    from bigtrain.engine.accelerate import AccelerateEngine

    return AccelerateEngine(config, build_model, device)
