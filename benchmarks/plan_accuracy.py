"""The planned memory of a rank against what real ranks hold: `python benchmarks/plan_accuracy.py [--ranks 4]`.

Real is: ranks of gloo in processes of their own, bigtrain's engine and models, two optimizer steps and a batch of the
last evaluation, every tensor's bytes counted from the operator that makes it until its last reference goes
(bigtrain/plan/measured.py), of the rank that needs most. Not in it: scratch memory inside operators, the copy that a
save makes, and the libraries (the plan's `context` and `kernels`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bigtrain.config import Config, from_dict
from bigtrain.plan import memory, sizes

GPT = {"kind": "decoder", "dim": 256, "n_layers": 4, "n_heads": 4, "vocab_size": 4096, "max_seq_len": 128}
LLAMA = GPT | {
    "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "ffn_dim": 704, "n_kv_heads": 2,
    "tie_embeddings": False,
}  # fmt: skip
BERT = {"kind": "encoder", "dim": 256, "n_layers": 4, "n_heads": 4, "vocab_size": 4096, "max_seq_len": 128}
SMALL_BATCH = {"global_batch": 4, "micro_batch": 1}
PER_RANK = {"global_batch": 32, "micro_batch": 8}
ACCUMULATED = {"global_batch": 32, "micro_batch": 4}


CLASSIFIER = BERT | {"dim": 128, "n_layers": 2, "vocab_size": 4096}
TRANSFORMER = {
    "kind": "seq2seq", "dim": 128, "n_layers": 2, "n_decoder_layers": 2, "n_heads": 4, "vocab_size": 2048,
    "max_seq_len": 64,
}  # fmt: skip


def recipe(model: dict[str, Any], stage: int, precision: str, **train: Any) -> dict[str, Any]:
    bucket, optimizer = train.pop("bucket_mib", 1), train.pop("optimizer", "adamw")
    task = train.pop("task", "masked_lm" if model["kind"] == "encoder" else "causal_lm")
    more = {"max_new_tokens": 16, "num_beams": train.pop("num_beams", 1)} if task == "translation" else {}
    return {
        "model": model, "task": {"kind": task} | more,
        "engine": {"kind": "deepspeed", "stage": stage, "bucket_mib": bucket},
        "optimizer": {"kind": optimizer},
        "train": {"steps": 10, "global_batch": 16, "micro_batch": 4, "precision": precision} | train,
    }  # fmt: skip


# name -> plain config. global_batch is of 4 ranks at most: with 2 there are twice as many micro-batches.
RECIPES: dict[str, dict[str, Any]] = {
    "GPT, ZeRO-0, fp32": recipe(GPT, 0, "fp32"),
    "GPT, ZeRO-0, bf16": recipe(GPT, 0, "bf16"),
    "GPT, ZeRO-1, bf16": recipe(GPT, 1, "bf16"),
    "GPT, ZeRO-1, bf16, accumulation": recipe(GPT, 1, "bf16", **ACCUMULATED),
    "GPT, ZeRO-2, fp32": recipe(GPT, 2, "fp32"),
    "GPT, ZeRO-2, bf16, accumulation": recipe(GPT, 2, "bf16", **ACCUMULATED),
    "GPT, ZeRO-2, bf16, checkpointing": recipe(GPT, 2, "bf16", activation_checkpointing=True),
    "GPT, ZeRO-3, bf16": recipe(GPT, 3, "bf16"),
    "GPT, ZeRO-3, fp32, checkpointing": recipe(GPT, 3, "fp32", activation_checkpointing=True),
    "GPT, ZeRO-3, bf16, small batch": recipe(GPT, 3, "bf16", **SMALL_BATCH),
    "GPT, ZeRO-2, bf16, buckets of 50 MiB": recipe(GPT, 2, "bf16", bucket_mib=50),
    "GPT, ZeRO-2, bf16, small batch": recipe(GPT, 2, "bf16", **SMALL_BATCH),
    "Llama, ZeRO-2, bf16": recipe(LLAMA, 2, "bf16"),
    "Llama, ZeRO-3, fp32": recipe(LLAMA, 3, "fp32"),
    "Llama, ZeRO-2, bf16, Lion": recipe(LLAMA, 2, "bf16", optimizer="lion"),
    "BERT, ZeRO-1, fp32": recipe(BERT, 1, "fp32"),
    "BERT, ZeRO-2, bf16": recipe(BERT, 2, "bf16"),
    "BERT, ZeRO-3, bf16, checkpointing": recipe(BERT, 3, "bf16", activation_checkpointing=True),
    # As the recipes of conf/experiment, small; examples as long as the model takes, as where no data is prepared.
    "tiny": recipe(GPT | {"dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 512, "max_seq_len": 64}, 2, "fp32"),
    "bert_pretrain": recipe(BERT | {"dim": 128, "n_layers": 2, "max_seq_len": 64}, 2, "bf16", **PER_RANK),
    "classification": recipe(CLASSIFIER, 2, "bf16", task="classification", **PER_RANK),
    "tagging": recipe(CLASSIFIER, 2, "bf16", task="tagging", **PER_RANK),
    "question_answering": recipe(CLASSIFIER, 2, "bf16", task="question_answering", **PER_RANK),
    "instruction": recipe(GPT | {"dim": 128, "max_seq_len": 256}, 2, "bf16", task="instruction", **PER_RANK),
    "translation": recipe(TRANSFORMER, 2, "bf16", task="translation", **PER_RANK),
    "translation, evaluated with beams": recipe(TRANSFORMER, 2, "bf16", task="translation", num_beams=4, **PER_RANK),
}


def planned(recipe: dict[str, Any], ranks: int) -> memory.Memory:
    config = from_dict(recipe)
    return memory.estimate(config, ranks, sizes.of_run(config), "cpu")


def measure(recipes: list[dict[str, Any]], evaluates: bool = False) -> list[dict[str, Any]]:
    """In a rank: what each recipe really takes, with a batch of the last evaluation or without."""
    import gc

    import torch

    from bigtrain.engine import start
    from bigtrain.plan import rehearsal

    device = start.init_distributed("cpu", 300)
    found = []
    for plain in recipes:
        config: Config = from_dict(plain)
        rehearsed = rehearsal.rehearse(config, device, evaluates=evaluates)
        assert rehearsed.stepped, "the optimizer did not step: its memory was not measured"
        found.append(vars(rehearsed))
        gc.collect()
    torch.distributed.barrier()
    return found


def in_ranks(recipes: list[dict[str, Any]], ranks: int) -> list[list[dict[str, Any]]]:
    """`measure` in real ranks; what each returned."""
    from bigtrain.launch import ops

    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        (Path(folder) / "recipes.json").write_text(json.dumps(recipes))
        processes = []
        for rank in range(ranks):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                "TORCH_EXTENSIONS_DIR": str(ops.extensions_dir()), "PATH": ops.search_path(),
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            command = [sys.executable, __file__, "--rank-of", folder]
            log = None if rank == 0 and os.environ.get("BIGTRAIN_TRACEBACK") else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}; BIGTRAIN_TRACEBACK=1 shows why")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        result = measure(json.loads((arguments.rank_of / "recipes.json").read_text()), evaluates=True)
        (arguments.rank_of / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
        os._exit(0)
    real = in_ranks(list(RECIPES.values()), arguments.ranks)
    print(
        f"{'':40}{'planned MiB':>12}{'real MiB':>10}{'error':>8}{'states':>8}"
        f"{'evaluation':>12}{'real':>10}  fullest moment"
    )
    errors = []
    for number, (name, plain) in enumerate(RECIPES.items()):
        plan = planned(plain, arguments.ranks)
        peak = max(of_rank[number]["peak"] for of_rank in real)
        parts = real[0][number]["parts"]
        states = sum(plan.states.get(part, 0) for part in parts) / sum(parts.values()) - 1
        plan = plan.without("save")  # which is not rehearsed
        evaluation = next(each for each in plan.moments if each.name == "evaluation").total
        held_out = max(of_rank[number]["phases"]["evaluation"] for of_rank in real)
        errors.append(plan.peak.total / peak - 1)
        row = f"{name:40}{plan.peak.total / 2**20:12.1f}{peak / 2**20:10.1f}{errors[-1]:+8.2%}{states:+8.2%}"
        print(f"{row}{evaluation / 2**20:12.1f}{held_out / 2**20:10.1f}  {plan.peak.name}")
    errors = sorted(map(abs, errors))
    print(f"error: median {statistics.median(errors):.2%}, worst {errors[-1]:.2%}, of {len(errors)} recipes")


if __name__ == "__main__":
    main()
