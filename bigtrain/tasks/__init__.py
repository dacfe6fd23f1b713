"""Tasks: `build` makes the one that the config's task section names, on its prepared data."""

from __future__ import annotations

from bigtrain.config import (
    ClassificationConfig,
    Config,
    InstructionConfig,
    MaskedLMConfig,
    QuestionAnsweringConfig,
    TaggingConfig,
    TranslationConfig,
)
from bigtrain.tasks.base import Evaluated, Task, Totals, TrainLoader

__all__ = ["Evaluated", "Task", "Totals", "TrainLoader", "build"]


def build(config: Config) -> Task:
    """Raises ConfigError if the data are not prepared, or not whole."""
    if isinstance(config.task, ClassificationConfig):
        from bigtrain.tasks.classification import Classification

        return Classification(config)
    if isinstance(config.task, TaggingConfig):
        from bigtrain.tasks.tagging import Tagging

        return Tagging(config)
    if isinstance(config.task, QuestionAnsweringConfig):
        from bigtrain.tasks.question_answering import QuestionAnswering

        return QuestionAnswering(config)
    if isinstance(config.task, TranslationConfig):
        from bigtrain.tasks.translation import Translation

        return Translation(config)
    if isinstance(config.task, InstructionConfig):
        from bigtrain.tasks.instruction import Instruction

        return Instruction(config)
    if isinstance(config.task, MaskedLMConfig):
        from bigtrain.tasks.masked_lm import MaskedLM

        return MaskedLM(config)
    from bigtrain.tasks.causal_lm import CausalLM

    return CausalLM(config)
