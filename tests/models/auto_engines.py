"""Models in transformers' code under every engine, run inside real ranks by test_auto_engines.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from bigtrain.batch import Batch, LossSums
from bigtrain.checkpoint.transfer import load_initial
from bigtrain.config import LoRAConfig
from bigtrain.engine import start
from bigtrain.engine.base import Engine
from bigtrain.engine.host import HostGroup
from bigtrain.models.huggingface import auto
from bigtrain.models.lora import add_lora, merged
from tests.distributed.curves import ENGINES, GLOBAL_BATCH, join, make

VOCABULARY, LENGTH, STEPS, LABELS = 97, 12, 4, 3


def curves(cells: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Of each cell (directory, task, engines, and rank, that of LoRA): {engine: losses of the steps, what is trained,
    how far each weight has moved (on rank 0)}."""
    host = join()
    return [learned(host, **cell) for cell in cells]


def learned(host: HostGroup, directory: str, task: str, engines: list[str], rank: int) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for name in engines:
        AcceleratorState._reset_state(True)  # Accelerate keeps its first settings for a process's life
        config = make(ENGINES[name], "fp32", {"kind": "adamw", "lr": 1e-2})
        built = start.build(config, partial(build_model, Path(directory), task, rank), torch.device("cpu"))
        trained = [key for key, parameter in built.model.named_parameters() if parameter.requires_grad]
        before = dict(merged(built.weights(), built.model))
        losses = [train_step(built, task, host) for _ in range(STEPS)]
        after = dict(merged(built.weights(), built.model))
        moved = {key: float((after[key] - before[key]).abs().max()) for key in after if after[key].numel()}
        result[name] = {"losses": losses, "trained": trained, "moved": moved}
    return result


def build_model(directory: Path, task: str, rank: int) -> torch.nn.Module:
    """As the worker does."""
    torch.manual_seed(0)
    found = auto.read_config(directory, task)
    model: Any
    if task == "causal_lm":
        model = auto.CausalLM(found)
    elif task == "masked_lm":
        model = auto.MaskedLM(found)
    else:
        model = auto.Classifier(found, task, LABELS, pad_id=0)
    report = load_initial(model, str(directory))
    if rank:
        add_lora(model, LoRAConfig(rank=rank), report.new)
    return model  # type: ignore[no-any-return]


def train_step(built: Engine, task: str, host: HostGroup) -> float:
    """The loss of the global batch, the same one each time."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=draw)
    mask = torch.ones_like(tokens)
    mask[::2, 9:] = 0
    batch = {"tokens": tokens.where(mask == 1, 0), "mask": mask}
    if task == "classification":
        batch["targets"] = tokens[:, 1] % LABELS
    else:
        whole = tokens % LABELS if task == "tagging" else tokens.roll(-1, 1)
        batch["targets"] = whole.masked_fill(torch.arange(LENGTH) % 3 == 0, -100)
    share = GLOBAL_BATCH // host.world_size
    mine = {key: whole[host.rank * share : (host.rank + 1) * share] for key, whole in batch.items()}
    count = int((batch["targets"] != -100).sum())

    def loss(model: torch.nn.Module, batch: Batch) -> LossSums:
        if task == "causal_lm":
            return LossSums(*model(batch["tokens"], batch["targets"]))
        if task == "masked_lm":
            return LossSums(*model(batch["tokens"], batch["mask"], None, batch["targets"])[0])
        logits = model(batch["tokens"], batch["mask"])
        found = F.cross_entropy(logits.flatten(0, -2), batch["targets"].flatten(), reduction="sum")
        return LossSums(found, found.detach())

    total = 0.0
    for first in range(0, share, 2):
        part = {key: rows[first : first + 2] for key, rows in mine.items()}
        total += float(built.forward_backward(loss, part, 1 / count, first + 2 == share).nll)
    built.step(1.0)
    return host.sum(total)[0] / count
