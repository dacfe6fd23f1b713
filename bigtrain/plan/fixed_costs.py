"""What a step costs beside arithmetic: hooks, launches, Python and many small collectives, a layer at a time.

Measured in a rank by training models with next to no arithmetic in them through the real engine, two of different
depth: what the deeper one takes longer is its further layers', the rest any step's.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

DEPTHS = (1, 5)
STEPS, WARM = 24, 4
LEAST = 1e-6  # seconds: where two depths take equally long
KINDS = {"": 2, "_gathered": 3}  # suffix of the figures' names -> ZeRO stage


def measured(device: Any) -> dict[str, float]:
    """Seconds: layer_seconds of a layer in a forward and backward pass, layer_step_seconds of a layer in an optimizer
    step, step_seconds of a step besides; and the same with the suffix _gathered where layers are gathered (ZeRO-3).

    All ranks of the process group call it together."""
    found: dict[str, float] = {}
    for suffix, stage in KINDS.items():
        (few_passes, few_steps), (many_passes, many_steps) = (_seconds(device, stage, depth) for depth in DEPTHS)
        further = DEPTHS[1] - DEPTHS[0]
        layer = max(LEAST, (many_passes - few_passes) / further)
        layer_step = max(LEAST, (many_steps - few_steps) / further)
        rest = few_passes + few_steps - DEPTHS[0] * (layer + layer_step)
        found |= {
            f"layer_seconds{suffix}": layer,
            f"layer_step_seconds{suffix}": layer_step,
            f"step_seconds{suffix}": max(LEAST, rest),
        }
    return found


def _seconds(device: Any, stage: int, layers: int) -> tuple[float, float]:
    """Medians of a forward and backward pass and of an optimizer step."""
    import torch
    import torch.distributed as dist

    from bigtrain import models
    from bigtrain.batch import LossSums
    from bigtrain.config import Config, DecoderConfig, DeepSpeedConfig, TrainConfig
    from bigtrain.engine.deepspeed import DeepSpeedEngine

    model = DecoderConfig(dim=64, n_heads=2, n_layers=layers, vocab_size=64, max_seq_len=8)
    train = TrainConfig(precision="fp32", global_batch=dist.get_world_size())
    config = Config(model=model, engine=DeepSpeedConfig(stage=stage), train=train)
    engine = DeepSpeedEngine(config, lambda: models.build(model), device)
    batch = {"tokens": torch.zeros(1, 8, dtype=torch.long, device=device)}

    def loss(wrapped: Any, batch: dict[str, Any]) -> LossSums:
        return LossSums(*wrapped(batch["tokens"], targets=batch["tokens"]))

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    passes, steps = [], []
    for _ in range(STEPS):
        dist.barrier()
        began = now()
        engine.forward_backward(loss, batch, 1.0, True)
        passed = now()
        engine.step(1.0)
        passes.append(passed - began)
        steps.append(now() - passed)
    return statistics.median(passes[WARM:]), statistics.median(steps[WARM:])
