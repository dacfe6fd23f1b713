"""The span of a context that answers a question, or none."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.config import Config, HuggingFaceConfig, ModelConfig, QuestionAnsweringConfig
from bigtrain.data.example_loader import Rows, stack
from bigtrain.data.examples import Examples
from bigtrain.models.heads import QuestionAnsweringHead
from bigtrain.tasks import metrics, resampled
from bigtrain.tasks.base import Evaluated, Totals
from bigtrain.tasks.labelled import LabelledTask, WithHead, build_encoder
from bigtrain.tasks.resampled import Resampled

N_BEST = 5  # spans of a window that are looked at, and answers to a question that are told


class QuestionAnswering(LabelledTask):
    """BERT's on SQuAD (arXiv 1810.04805, sections 4.2 and 4.3): a span's score is its start's logit and its end's, that
    of no answer [CLS]'s as both. Only the window's context, and [CLS], are candidates."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.task, QuestionAnsweringConfig)
        self.config = config.task

    def build_model(self, config: ModelConfig) -> nn.Module:
        if isinstance(config, HuggingFaceConfig):
            from bigtrain.models.huggingface import auto

            return auto.Classifier(config, "question_answering", 2, self.special_ids["pad"])
        backbone = build_encoder(config, pooled=False)
        return WithHead(backbone, QuestionAnsweringHead(backbone.config, self.config.dropout), pooled=False)

    def collate(self, rows: Rows, random: np.random.Generator | None) -> Batch:
        """Besides the inputs: start and end, the targets (B,); cls (B,); context (B, T), whether a token is of it."""
        batch = self.inputs(rows)
        scored = batch["index"] >= 0
        for name in ("start", "end"):
            batch[name] = stack(rows, name).long().where(scored, IGNORED)
        positions = torch.arange(batch["tokens"].size(1))
        begins = stack(rows, "context_at").long()
        lengths = torch.tensor([len(row["char_begins"]) for row in rows])
        batch["context"] = (positions >= begins[:, None]) & (positions < (begins + lengths)[:, None])
        batch["cls"] = (batch["tokens"] == self.special_ids["cls"]).int().argmax(1)
        return batch

    def count_targets(self, batch: Batch) -> int:
        return int((batch["index"] >= 0).sum())

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        loss = self._loss(self._logits(model, batch), batch)
        return LossSums(loss, loss.detach())

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, T, 2) float32: -inf where no answer can begin or end."""
        candidates = batch["context"].scatter(1, batch["cls"][:, None], True)
        return self.outputs(model, batch).float().masked_fill(~candidates[..., None], -torch.inf)

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean of the two cross-entropies, summed over windows."""
        start, end = logits.unbind(-1)
        losses = [
            F.cross_entropy(side, batch[name], ignore_index=IGNORED, reduction="sum")
            for side, name in ((start, "start"), (end, "end"))
        ]
        return (losses[0] + losses[1]) / 2

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluated:
        """Of each window: (score of no answer, [(score, first context token, last), ...] of the best spans)."""
        logits = self._logits(model, batch)
        null = logits.gather(1, batch["cls"][:, None, None].expand(-1, -1, 2)).sum((1, 2))
        in_context = logits.masked_fill(~batch["context"][..., None], -torch.inf)
        scores, starts, ends = best_spans(in_context, self.config.max_answer_length, N_BEST)
        first = batch["context"].int().argmax(1, keepdim=True)
        spans = zip(scores.tolist(), (starts - first).tolist(), (ends - first).tolist(), strict=True)
        rows = [
            (score, [span for span in zip(*found, strict=True) if span[0] > -torch.inf])
            for score, found in zip(null.tolist(), spans, strict=True)
        ]
        return Evaluated(self._loss(logits, batch), {}, self.numbered(batch, rows))

    def join(self, record: int, parts: list[tuple[int, Any]]) -> dict[str, Any]:
        """One answer from all windows of a question: the best span of any, or none where that scores more than
        task.no_answer_threshold above it (tau in arXiv 1810.04805, section 4.3, with the sign turned).

        No answer scores as in the window that is least for it, as in BERT's own run_squad.py; a span that two windows
        share as in the one that is more for it. A sample of the batches (train.eval_batches) may lack windows.
        """
        null = min(score for _, (score, _) in parts)
        spans: dict[tuple[int, int], float] = {}
        for index, (_, found) in parts:
            example = self._examples[index]
            for score, first, last in found:
                span = int(example["char_begins"][first]), int(example["char_ends"][last])
                spans[span] = max(score, spans.get(span, -np.inf))
        asked = self._records[record]
        threshold = self.config.no_answer_threshold
        found = [(score, *_trimmed(asked["context"], *span)) for span, score in spans.items()]
        told = sorted((answer for answer in found if answer[1]), key=lambda answer: -answer[0])
        best, best_text, _ = told[0] if told else (null, "", -1)
        place = sum(null - answer[0] <= threshold for answer in told)
        told = [*told[:place], (null, "", -1), *told[place:]][:N_BEST]
        weights = np.exp(np.array([score for score, _, _ in told]) - max(score for score, _, _ in told))
        answers = [
            {"text": text, "start": start, "probability": float(share)}
            for (_, text, start), share in zip(told, weights / weights.sum(), strict=True)
        ]
        golds = [answer["text"] for answer in asked["answers"]]
        exact, f1 = metrics.squad_scores(best_text, golds)
        exact_of_none, _ = metrics.squad_scores("", golds)
        scores = {
            "exact": exact, "f1": f1, "exact_of_none": exact_of_none, "answerable": bool(golds), "margin": null - best
        }  # fmt: skip
        return {"answers": answers, "scores": scores}

    @cached_property
    def _examples(self) -> Examples:
        return Examples(self.data, "held_out")

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        return list(self.data.held_out_records())

    def metrics(self, totals: Totals) -> dict[str, float]:
        return {"eval/loss": totals.nll / totals.targets} | self._scored(**_columns(totals))

    def resampled(self, totals: Totals) -> Resampled:
        return resampled.columns(self._scored, **_columns(totals))

    def _scored(self, **columns: Any) -> dict[str, float]:
        return metrics.question_answering(**columns, threshold=self.config.no_answer_threshold)

    def prediction(self, row: Any) -> dict[str, Any]:
        """A row of the predictions file: the answer, "" for none, and the best ones with what they have of the
        probability of all those."""
        best = row["answers"][0]
        return {"prediction": best["text"], "probability": best["probability"], "n_best": row["answers"]}


def _columns(totals: Totals) -> dict[str, list[float]]:
    """What `join` gave of all questions, by name."""
    scores = [row["scores"] for row in totals.predictions.values()]
    return {name: [row[name] for row in scores] for name in scores[0]}


def best_spans(logits: Tensor, longest: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits (B, T, 2) -> the `count` best spans of at most `longest` tokens: score, start, end, each (B, count).

    Spans that cannot be have the score -inf.
    """
    start, end = logits.unbind(-1)
    longest = min(longest, start.size(1))
    ends = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # (B, T, longest): from each start on
    scores = (start[..., None] + ends).flatten(1)
    best, where = scores.topk(min(count, scores.size(1)))
    begins = where // longest
    return best, begins, begins + where % longest


def _trimmed(context: str, begin: int, end: int) -> tuple[str, int]:
    """(text, start) without the space that a token may begin with."""
    text = context[begin:end]
    return text.strip(), begin + len(text) - len(text.lstrip())
