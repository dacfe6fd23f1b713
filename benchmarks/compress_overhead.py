"""What pruning costs while training: time of a masked step, of choosing the masks anew, memory.

    python benchmarks/compress_overhead.py                                   # a 20M Llama, ZeRO-2 on two ranks
    python benchmarks/compress_overhead.py model=gpt2_124m engine=zero3 -- --steps 6

Settings are bigtrain's own. Steps with the masks on and off alternate on the same engine, and their medians are
compared: on a machine whose speed drifts nothing else tells 3% apart. "hold" is the time of holding the masks by
itself, within a step; "choose" that of one exact global choice over all ranks, the new working weights included.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from bigtrain import compose, compress, models
from bigtrain import config as schema
from bigtrain.batch import Batch, LossSums
from bigtrain.compress.masks import Masks
from bigtrain.compress.prune import Prune
from bigtrain.config import Config
from bigtrain.engine import start
from bigtrain.engine.host import HostGroup

DEFAULTS = [
    "model=llama_20m", "model.vocab_size=4096", "model.max_seq_len=256", "train.global_batch=8",
    "compress=[prune_global]", "compress.prune.schedule.kind=constant", "compress.prune.schedule.begin=0",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="settings, as on bigtrain's command line")
    parser.add_argument("--steps", type=int, default=12, help="of each kind")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    compose.run([*DEFAULTS, *arguments.overrides], lambda job: found.append(job.data) or 0.0)  # type: ignore[func-returns-value]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(arguments.ranks):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.ranks),
            "LOCAL_WORLD_SIZE": str(arguments.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // arguments.ranks)),
            "BENCHMARK": json.dumps([found[0], arguments.steps]),
        }  # fmt: skip
        ranks.append(subprocess.Popen([sys.executable, __file__], env=environment, stderr=subprocess.DEVNULL))
    sys.exit(max(process.wait() for process in ranks))


def rank_main(config: Config, steps: int) -> None:
    device = start.init_distributed("cpu", 600)
    host = HostGroup(600)
    prune = next(transform for transform in compress.build(config) if isinstance(transform, Prune))

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        model: Any = models.build(config.model)  # type: ignore[arg-type]
        prune.apply(model)
        return model

    held: list[float] = []
    after_step = Masks.after_step

    def timed(masks: Masks, flat: Any) -> None:
        began = time.perf_counter()
        after_step(masks, flat)
        held[-1] += time.perf_counter() - began

    Masks.after_step = timed  # type: ignore[method-assign, assignment]
    engine = start.build(config, build, device)
    prune.attach(engine, host)
    prune.begin(0)
    masks, pruned = prune.masks, prune.masks.pruned
    vocabulary, length = config.model.vocab_size or 0, config.model.max_seq_len
    batch_size = schema.micro_batch(config, host.world_size)
    draw = torch.Generator().manual_seed(host.rank)

    def micro_batch() -> Batch:
        tokens = torch.randint(0, vocabulary, (batch_size, length + 1), generator=draw)
        return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}

    def loss(model: torch.nn.Module, batch: Batch) -> LossSums:
        return LossSums(*model(batch["tokens"], batch["targets"]))

    times: dict[bool, list[float]] = {False: [], True: []}
    accumulation = schema.accumulation_steps(config, host.world_size)
    scale = 1 / (config.train.global_batch * length)
    for step in range(2 * steps + 4):
        masked = step % 2 == 1
        masks.pruned = pruned if masked else 0
        held.append(0.0)
        dist.barrier()
        began = time.perf_counter()
        for index in range(accumulation):
            engine.forward_backward(loss, micro_batch(), scale, index == accumulation - 1)
        engine.step(1.0)
        dist.barrier()
        if step >= 4:
            times[masked].append(time.perf_counter() - began)
    choices = []
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        prune.choose(1.0)
        dist.barrier()
        choices.append(time.perf_counter() - began)
    if host.rank == 0:
        plain, with_masks = (statistics.median(times[masked]) for masked in (False, True))
        hold, choice = statistics.median(sorted(held)[-steps:]), statistics.median(choices)
        local = sum(part.keep.numel() for part in masks.parts)
        used = sum(part.keep.nbytes for part in masks.parts)
        packed = sum(-(-layer.shape.numel() // 8) for layer in masks.layers)
        engine_name = f"{config.engine.kind} stage {getattr(config.engine, 'stage', '-')}"
        print(f"{masks.weights / 1e6:.1f}M weights with masks, {pruned / masks.weights:.2%} pruned; {engine_name}")
        print(f"step without masks  {plain:8.4f} s   with  {with_masks:8.4f} s   {with_masks / plain - 1:+.1%}")
        print(f"hold                {hold:8.4f} s   {hold / plain:.2%} of a step")
        print(f"choose              {choice:8.4f} s   {choice / plain:.0%} of a step")
        print(f"memory              {used / local:.2f} bytes per local weight")
        print(f"checkpoint          {8 * packed / masks.weights:.2f} bits per weight")
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    if "BENCHMARK" in os.environ:
        data, count = json.loads(os.environ["BENCHMARK"])
        rank_main(schema.from_dict(data), count)
    main()
