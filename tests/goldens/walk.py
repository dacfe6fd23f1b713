"""Runs inside real ranks, one after another in the same processes: all of `bigtrain train` but its start."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from bigtrain import worker
from bigtrain.engine import peak, start
from tests.goldens.recipes import CURVES, at_home


def walk(files: list[str]) -> list[dict[str, Any]]:
    """Of each run, given by its config.yaml: curves and final metrics, or why there are none."""
    start.init_distributed("cpu", 120)
    # Once for all runs: to join and to leave, to measure the machine, to hash the source.
    start.init_distributed = lambda *_: torch.device("cpu")
    torch.distributed.destroy_process_group = lambda *_: None
    peak.peak_flops = lambda *_: 0.0
    worker.code_sha256 = lambda: ""
    with at_home():
        return [run(Path(file)) for file in files]


def run(file: Path) -> dict[str, Any]:
    AcceleratorState._reset_state(True)  # Accelerate keeps its first settings for a process's life
    torch._dynamo.reset()
    folder = file.parent
    try:
        with open(os.devnull, "w") as terminal:
            config = worker.read_config(file, hashlib.sha256(file.read_bytes()).hexdigest())
            worker.run(config, folder, terminal, threading.Event(), time.time())
    except Exception as error:  # the next one may do; a rank that waits for another in a collective ends them all
        return {"problem": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        name: {line["step"]: line[name] for line in lines if line.get(name) is not None} for name in CURVES
    }
    result = json.loads((folder / "result.json").read_text())
    return found | {"eval": {name: value for name, value in result.items() if name.startswith("eval/")}}
