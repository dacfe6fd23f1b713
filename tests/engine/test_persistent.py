"""What ZeRO-3 keeps whole is put together in few collectives, and is what DeepSpeed would have put together."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from bigtrain import models
from bigtrain.batch import LossSums
from bigtrain.config import Config, DecoderConfig, DeepSpeedConfig, TrainConfig
from bigtrain.engine import persistent, start
from tests.distributed.ranks import run_ranks

MODEL = DecoderConfig(dim=48, n_heads=2, n_layers=3, vocab_size=96, max_seq_len=8)


def step(bucket_bytes: int, precision: str) -> tuple[int, int, int, bool]:
    """In a rank: collectives of the gather after a step, buckets that there should be, parameters, and whether those
    are what DeepSpeed makes of their parts."""
    from bigtrain.engine.deepspeed import DeepSpeedEngine

    start.init_distributed("cpu", 120)
    train = TrainConfig(precision=precision, global_batch=2)  # type: ignore[arg-type]
    config = Config(model=MODEL, engine=DeepSpeedConfig(stage=3), train=train)
    engine = DeepSpeedEngine(config, lambda: models.build(MODEL), torch.device("cpu"))
    kept = engine.engine.optimizer.persistent_parameters
    tokens = torch.arange(8).view(1, 8) + dist.get_rank()

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> LossSums:
        return LossSums(*model(batch["tokens"], targets=batch["tokens"]))

    before = [parameter.detach().clone() for parameter in kept]
    engine.forward_backward(loss, {"tokens": tokens}, 1.0, True)
    sent = dist.all_gather_into_tensor
    with (
        mock.patch.object(persistent, "BUCKET_BYTES", bucket_bytes),
        mock.patch.object(dist, "all_gather_into_tensor", side_effect=sent) as ours,
    ):
        engine.step(1.0)
    found = [parameter.detach().clone() for parameter in kept]
    assert any(not torch.equal(old, new) for old, new in zip(before, found, strict=True))
    for parameter in kept:
        parameter.partition()
        parameter.all_gather(async_op=False)  # of one alone: DeepSpeed's own way
    same = all(torch.equal(parameter, new) for parameter, new in zip(kept, found, strict=True))
    size = sum(parameter.ds_numel * parameter.element_size() for parameter in kept)
    return ours.call_count, -(-size // bucket_bytes), len(kept), same


@pytest.mark.parametrize(("bucket_bytes", "precision"), [(2**24, "bf16"), (2**15, "fp32")])
def test_many_in_one_collective_and_the_same_weights(bucket_bytes: int, precision: str) -> None:
    given = {"bucket_bytes": bucket_bytes, "precision": precision}
    for calls, buckets, parameters, same in run_ranks(f"{__name__}:step", 2, given):
        assert same
        assert parameters > 30
        assert buckets <= calls <= 2 * buckets
        assert 2 * calls < parameters
