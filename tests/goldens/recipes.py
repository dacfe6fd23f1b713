"""Every recipe, so small that its 20 steps take a fraction of a second, on the texts that lie here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
STEPS = 20
CURVES = ("train/loss", "train/grad_norm")  # that are kept, of each step
STAGES = ("zero0", "zero1", "zero2", "zero3")
ENGINES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)},
    "zero2_offload": {"kind": "deepspeed", "stage": 2, "offload_optimizer": "cpu"},
    "zero3_offload": {"kind": "deepspeed", "stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "ddp": {"kind": "accelerate", "parallel": "ddp"},
    "fsdp2": {"kind": "accelerate", "parallel": "fsdp2"},
}

COMMON = [
    f"train.steps={STEPS}", "schedule.warmup_steps=4", "train.global_batch=8", "train.micro_batch=null",
    "train.precision=fp32", "train.eval_every=0", "train.save_every=0", "train.compile=false", "data.held_out=0.2",
    "data.tokenizer.path=texts/tokenizer", "launch.device=cpu", "launch.ranks=2",
    "launch.shared_run_dir=false",  # no checkpoints: their time is not spent on numbers
    "logger=quiet", "logger.log_every=1",
]  # fmt: skip
DECODER = ["model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.max_seq_len=32", "model.vocab_size=null"]
LLAMA = [*DECODER, "model.ffn_dim=64", "model.n_kv_heads=1"]
ENCODER = ["model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.max_seq_len=48"]
TWICE = "train.micro_batch=2"  # of a rank's four sequences: gradients are accumulated


def on(name: str) -> list[str]:
    """The data of a file in texts/."""
    return [f"data={'text' if name == 'documents.jsonl' else 'labelled'}", f"data.path=texts/{name}"]


TINY = ["experiment=tiny", *DECODER, *on("documents.jsonl"), "model.n_layers=2"]
SHORT = "train.steps=10"  # what one engine or two are enough for
CLASSES = ["experiment=classification", *ENCODER, *on("classes.tsv")]
ANSWERS = ["experiment=instruction", *DECODER, "model.max_seq_len=64"]


@dataclass(frozen=True)
class Recipe:
    """What is typed, and the engines that all must give the same curves."""

    overrides: list[str]
    engines: tuple[str, ...] = STAGES


# The recipes of conf/experiment. Left out: ladder and ladder_short (tiny's run, once its size is set), bert_tiny's
# (bert_pretrain's), and private, which runs on one rank (tests/engine/test_private.py).
# fmt: off
RECIPES: dict[str, Recipe] = {
    "tiny": Recipe([*TINY, TWICE], (*STAGES, "ddp")),
    "gpt2_124m": Recipe(["experiment=gpt2_124m", *DECODER, *on("documents.jsonl"), "optimizer.lr=3e-3"]),
    "llama_1b": Recipe(["experiment=llama_1b", *LLAMA, *on("documents.jsonl"), "optimizer.lr=3e-3"]),
    "llama_7b": Recipe(["experiment=llama_7b", *LLAMA, *on("documents.jsonl")], ("zero2_offload",)),
    "billion_on_a_laptop": Recipe(
        ["experiment=billion_on_a_laptop", *LLAMA, *on("documents.jsonl"), "optimizer.lr=3e-3"], ("zero3_offload",)
    ),
    "bert_pretrain": Recipe(["experiment=bert_pretrain", *ENCODER, "model.n_layers=2", *on("documents.jsonl")]),
    "classification": Recipe([*CLASSES, TWICE]),
    "tagging": Recipe(["experiment=tagging", *ENCODER, *on("tags.conll")]),
    "question_answering": Recipe(["experiment=question_answering", *ENCODER, *on("questions.json"), "task.stride=8"]),
    "instruction": Recipe([*ANSWERS, *on("answers.jsonl")]),
    "translation": Recipe(
        ["experiment=translation", "model.dim=32", "model.n_layers=1", "model.n_decoder_layers=1", "model.n_heads=2",
         "model.max_seq_len=32", "task.max_new_tokens=4", *on("translations.tsv")]
    ),
    "finetune": Recipe(["experiment=finetune", "model.path=exports/bert", *on("classes.tsv"), "optimizer.lr=1e-3"],
                       ("zero2",)),
    "finetune_tagging": Recipe(
        ["experiment=finetune_tagging", "model.path=exports/bert", *on("tags.conll"), "optimizer.lr=1e-3"], ("zero3",)
    ),
    # compress
    "distil": Recipe([SHORT, *TINY, "compress=distil", "compress.distil.teacher=exports/gpt"], ("zero1",)),
    "prune_global": Recipe([SHORT, *TINY, "compress=prune_global", "compress.prune.schedule.every=2"],
                           ("zero1", "zero3")),
    "prune_2_4": Recipe([SHORT, *TINY, "compress=prune_2_4"], ("zero2",)),
    "prune_wanda": Recipe([SHORT, *TINY, "compress=prune_wanda", "compress.prune.schedule.every=2"], ("zero1",)),
    "prune_movement": Recipe([SHORT, *TINY, "compress=prune_movement", "compress.prune.schedule.every=2"], ("zero3",)),
    "qat_int8": Recipe([SHORT, *TINY, "compress=qat_int8"], ("zero2",)),
    "qat_int4": Recipe([SHORT, *TINY, "compress=qat_int4"], ("zero3",)),
    "qat_int2": Recipe([SHORT, *TINY, "compress=qat_int2"], ("zero0",)),
    # optimizers
    "lion": Recipe([SHORT, *TINY, "optimizer=lion"], ("zero2",)),
    "adafactor": Recipe([SHORT, *TINY, "optimizer=adafactor", "engine=zero0"], ("zero0",)),
    # what else makes a loss
    "dropout": Recipe([SHORT, *TINY, "model.dropout=0.2", "train.activation_checkpointing=true"], ("zero3",)),
    "documents": Recipe([SHORT, *TINY, "data.isolate_documents=true", "task.z_loss=1e-3"], ("zero1",)),
    "whole_words": Recipe(
        [SHORT, "experiment=bert_pretrain", *ENCODER, *on("documents.jsonl"), "task.sentence=order",
         "task.whole_word=true"], ("zero2",),
    ),
    "modern_bert": Recipe(
        [SHORT, "experiment=classification", "model=modern_bert_base", *ENCODER, "model.ffn_dim=64",
         "model.head_dim=null", "model.vocab_size=null", *on("classes.tsv")], ("zero1",),
    ),
    "regression": Recipe(
        [SHORT, "experiment=classification", *ENCODER, *on("scores.tsv"), "task.regression=true",
         "task.token_dropout=0.1"], ("zero2",),
    ),
    "adversarial": Recipe([SHORT, *CLASSES, "task.adversarial=fgm"], ("zero1", "zero3")),
    "chats": Recipe([SHORT, *ANSWERS, *on("chats.jsonl"), "task.template=chatml"], ("zero3",)),
    "lora": Recipe(
        [SHORT, "experiment=instruction", "model=pretrained", "model.path=exports/gpt", *on("answers.jsonl"),
         "model.max_seq_len=null", "train.lora.rank=2", "optimizer.lr=1e-2"], ("zero2",),
    ),
}
# fmt: on

# Runs of 12 steps that stopped after 6, with their checkpoint; and the engines that each is continued with.
SMALL = ["model.dim=8", "train.steps=12", "train.stop_at=6", "launch.shared_run_dir=true", "train.async_save=false"]
RUNS: dict[str, Recipe] = {
    "gpt_zero2": Recipe([*TINY, *SMALL, "engine=zero2"], ("zero2", "zero3", "zero0")),
    "bert_zero3": Recipe([*CLASSES, *SMALL, "engine=zero3"], ("zero3",)),  # resharded, its dropout would be another
    "pruned_zero1": Recipe(
        [*TINY, *SMALL, "engine=zero1", "compress=prune_global", "compress.prune.schedule.every=2"], ("zero1", "zero2")
    ),
}  # fmt: skip


@contextmanager
def at_home() -> Iterator[None]:
    """In this folder: paths in configs are relative to it, and no machine's."""
    before = os.getcwd()
    os.chdir(FOLDER)
    try:
        yield
    finally:
        os.chdir(before)
