"""GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978): int4 weights chosen with data, by llm-compressor.

It is not among our dependencies: it holds transformers at an older 5.x than the newest, so it has an environment of its
own, where `bigtrain export` is the same command.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bigtrain import tasks
from bigtrain.compress.formats import EXCLUDED, empty
from bigtrain.compress.layers import choose
from bigtrain.compress.quantize import PTQ, check_groups
from bigtrain.config import Config
from bigtrain.data.example_loader import Share
from bigtrain.errors import ConfigError

METHODS = ("gptq_int4", "awq_int4")
SAMPLES, BATCH = 128, 8  # of the training data; GPTQ's paper takes 128
SCHEME = PTQ["int4"]


def check(method: str, config: Config) -> None:
    """Raises ConfigError where llm-compressor is missing, or the model is none that it takes apart layer by layer."""
    if config.task.kind not in ("causal_lm", "instruction"):
        problem = f"is for models that write text, and RUN's task is {config.task.kind}"
        raise ConfigError("--quantize", method, problem, "take int8_dynamic, or train with compress=qat_int4")
    if importlib.util.find_spec("llmcompressor") is None:
        problem = "needs llm-compressor, which holds transformers at 5.17 or older"
        way_out = "pip install 'bigtrain[llm-compressor]' in an environment of its own, and run the same command there"
        raise ConfigError("--quantize", method, problem, way_out)
    if method == "awq_int4" and not torch.cuda.is_available():
        raise ConfigError("--quantize", method, "llm-compressor computes it on GPUs only", "take gptq_int4")


def write(method: str, config: Config, settings: dict[str, Any], plain: Path, out: Path) -> None:
    """The Hugging Face directory `plain` into `out`, in compressed-tensors' format; calibrated on RUN's training data.

    Raises ConfigError where groups do not divide a layer's rows, or the data are not here.
    """
    for layer in choose(empty(settings), ["*"], EXCLUDED, "--quantize"):
        check_groups(layer.module, layer.shape[1], SCHEME, "--quantize")
    import datasets
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=SCHEME.bits, symmetric=True, strategy="group", group_size=SCHEME.group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifier = GPTQModifier if method == "gptq_int4" else AWQModifier
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in _calibration(config)]
    oneshot(
        model=str(plain), dataset=datasets.Dataset.from_list(rows), num_calibration_samples=len(rows),
        max_seq_length=config.model.max_seq_len, output_dir=str(out), save_compressed=True,
        recipe=[modifier(config_groups=groups, ignore=["lm_head"])],
    )  # fmt: skip
    for path in plain.iterdir():
        if not (out / path.name).exists() and not path.name.startswith("model"):
            shutil.copy(path, out / path.name)


def _calibration(config: Config) -> Iterator[list[int]]:
    """Tokens that the run has trained on, from its beginning."""
    loader = tasks.build(config).train_loader(Share(0, 1, BATCH, BATCH, config.train.seed))
    for step in range(SAMPLES // BATCH):
        for batch in loader.batches(step):
            yield from batch["tokens"].tolist()
