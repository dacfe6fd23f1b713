"""Some optimizer steps of a run with its real engine, on random tokens, with every tensor's bytes counted.

The ranks are real ones (benchmarks/plan_accuracy.py), or one rank of many on tensors without memory (plan/traced.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bigtrain import models
from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.config import (
    Config,
    EncoderConfig,
    HuggingFaceConfig,
    InstructionConfig,
    MaskedLMConfig,
    TranslationConfig,
    accumulation_steps,
    micro_batch,
)
from bigtrain.engine import optimizers, start
from bigtrain.models import heads
from bigtrain.models.lora import add_lora
from bigtrain.plan import memory, sizes
from bigtrain.plan.flops import longest_sequence
from bigtrain.plan.measured import LiveBytes

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Rehearsed:
    """Bytes of one rank's tensors."""

    peak: int  # at any time
    states: int  # between two steps
    phases: dict[str, int]  # building, forward, backward, step, evaluation -> its most
    parts: dict[str, int]  # parameters, master, optimizer, gradients between two steps
    stepped: bool  # the optimizer itself has run, which an overflow would have kept it from


def rehearse(
    config: Config, device: torch.device, steps: int = 2, in_precision: bool = False, evaluates: bool = False
) -> Rehearsed:
    """Build the engine that `config` (with its vocabulary set) asks for and take `steps` steps, in this rank.

    The process group must be there. in_precision: the model is built in train.precision, not converted afterwards.
    evaluates: a batch of the last, whole evaluation follows.
    """
    ranks = torch.distributed.get_world_size()
    batch, accumulation = micro_batch(config, ranks), accumulation_steps(config, ranks)
    live = LiveBytes()
    with live:
        live.phase = "building"
        dtype = PRECISIONS[config.train.precision] if in_precision else torch.float32
        engine = start.build(config, lambda: build_model(config, dtype), device)
        engine.model.train()
        updates: list[bool] = []
        engine.optimizer.register_step_post_hook(lambda *_: updates.append(True))
        stepped = False
        for _ in range(steps):
            for number in range(accumulation):
                inputs = example(config, batch, device)
                live.phase = "forward"

                def loss(model: torch.nn.Module, inputs: Batch) -> LossSums:
                    found = _loss(config, model, inputs)
                    live.phase = "backward"
                    return found

                engine.forward_backward(loss, inputs, 1 / 1000, number == accumulation - 1)
            live.phase = "step"
            before = len(updates)
            stepped = bool(engine.step(1.0).applied) and len(updates) > before
            del inputs
            live.phase = "between"
        states = live.live
        if evaluates:
            live.phase = "evaluation"
            engine.model.eval()
            inputs = example(config, memory.held_out_sequences(config, ranks), device)
            with torch.no_grad():
                engine.evaluate(lambda model, batch: _evaluate(config, model, batch), inputs)
    return Rehearsed(live.peak, states, live.peaks, state_bytes(engine), stepped)


def build_model(config: Config, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """As the task builds it, without its data (and so with a few labels only)."""
    model = config.model
    assert not isinstance(model, HuggingFaceConfig)
    torch.manual_seed(config.train.seed)
    torch.set_default_dtype(dtype)
    module: Any = _encoder(config, model) if isinstance(model, EncoderConfig) else models.build(model)
    torch.set_default_dtype(torch.float32)
    module.set_activation_checkpointing(config.train.activation_checkpointing)
    if config.train.lora.rank:
        add_lora(module, config.train.lora)
    optimizers.freeze(module, config.train.freeze)
    return module  # type: ignore[no-any-return]


def _encoder(config: Config, model: EncoderConfig) -> torch.nn.Module:
    from bigtrain.tasks.labelled import WithHead, build_encoder
    from bigtrain.tasks.masked_lm import MaskedLMModel

    task = config.task
    if isinstance(task, MaskedLMConfig):
        pairs = task.sentence != "none"
        backbone = build_encoder(model, pooled=pairs)
        head = heads.MaskedLMHead(backbone.config, backbone.embedding)
        return MaskedLMModel(backbone, head, heads.PairHead(backbone.config) if pairs else None)
    pooled = task.kind == "classification"
    backbone = build_encoder(model, pooled)
    if task.kind == "question_answering":
        return WithHead(backbone, heads.QuestionAnsweringHead(backbone.config, 0.1), pooled)
    labels = 1 if getattr(task, "regression", False) else sizes.LABELS
    return WithHead(backbone, heads.ClassificationHead(backbone.config, labels, 0.1), pooled)


def example(config: Config, sequences: int, device: torch.device) -> Batch:
    """A micro-batch of random tokens at full length."""
    vocabulary, length = config.model.vocab_size or 0, longest_sequence(config)
    tokens = torch.randint(0, vocabulary, (sequences, length), device=device)
    batch = {"tokens": tokens, "targets": tokens}
    if isinstance(config.task, MaskedLMConfig):
        scored = torch.arange(length, device=device).expand_as(tokens) < round(config.task.mask_fraction * length)
        batch = {
            "tokens": tokens, "targets": tokens.where(scored, IGNORED), "token_types": torch.zeros_like(tokens),
            "pair": torch.zeros(sequences, dtype=torch.long, device=device),
        }  # fmt: skip
    return batch


def _loss(config: Config, model: torch.nn.Module, batch: Batch) -> LossSums:
    """The task's, on what `example` made."""
    if isinstance(config.task, MaskedLMConfig):
        (loss, nll), pair = model(batch["tokens"], None, batch["token_types"], batch["targets"])
        if pair is not None:
            loss = loss + F.cross_entropy(pair.float(), batch["pair"], reduction="sum")
        return LossSums(loss, nll)
    if isinstance(config.model, EncoderConfig):
        loss = model(batch["tokens"]).float().square().sum()
        return LossSums(loss, loss.detach())
    if config.model.kind == "seq2seq":
        return LossSums(*model(batch["tokens"], None, batch["tokens"], batch["targets"]))
    return LossSums(*model(batch["tokens"], batch["targets"]))


def _evaluate(config: Config, model: torch.nn.Module, batch: Batch) -> None:
    """What the task's `evaluate` computes, on what `example` made."""
    tokens, targets = batch["tokens"], batch["targets"]
    if isinstance(config.task, MaskedLMConfig):
        logits, _ = model(tokens, None, batch["token_types"], targets, predict=True)
        F.cross_entropy(logits.float(), targets[targets != IGNORED], reduction="sum")
    elif isinstance(config.task, InstructionConfig):
        logits = model(tokens).float()
        F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    elif isinstance(config.task, TranslationConfig):
        from bigtrain.models import decoder_layers
        from bigtrain.models.generation import translate

        mask = torch.ones_like(tokens)
        read = model(tokens, mask)
        model(tokens, mask, tokens, targets, 0.0, read)
        never = {"cls": 0, "sep": -1, "pad": 0}  # ends no text before max_new_tokens
        options = {"do_sample": False, "num_beams": config.task.num_beams}
        vocabulary, most = config.model.vocab_size or 0, config.task.max_new_tokens
        translate(model, decoder_layers(model), read, mask, never, vocabulary, most, options)
    else:
        _loss(config, model, batch)


def state_bytes(engine: Any) -> dict[str, int]:
    """What the engine holds between two steps: its weights, their fp32 masters, the optimizer's states."""
    weights, masters, moments = set(), set(), set()
    for parameter in engine.model.parameters():
        weights.add(getattr(parameter, "ds_tensor", parameter).untyped_storage())
    groups = [each for group in engine.optimizer.param_groups for each in group["params"]]
    zero = getattr(getattr(engine, "engine", None), "optimizer", None)
    groups += getattr(zero, "fp32_partitioned_groups_flat", [])  # ZeRO-3 lends them to the optimizer in a step only
    masters |= {each.untyped_storage() for each in groups}
    for state in engine.optimizer.state.values():
        moments |= {each.untyped_storage() for each in state.values() if torch.is_tensor(each) and each.dim()}

    def total(storages: set[Any]) -> int:
        return sum(storage.nbytes() for storage in storages)

    return {"parameters": total(weights), "master": total(masters - weights), "optimizer": total(moments)}
