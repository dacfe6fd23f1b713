"""The one place that knows DeepSpeed's shard layout, held to DeepSpeed's public API at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.engine import shards
from bigtrain.engine.base import Engine
from bigtrain.engine.host import HostGroup
from tests.distributed.curves import ENGINES, build, join, make, train
from tests.distributed.ranks import run_ranks

CHOICES = {name: choice for name, choice in ENGINES.items() if name != "fsdp2"}


def whole(engine: Engine, host: HostGroup) -> dict[str, dict[str, torch.Tensor]]:
    """{parameter: {"master" or state: whole tensor}}, put together from every rank's views; fails on a gap."""
    mine = [
        (view.name, view.start, view.shape, {"master": view.master} | view.states) for view in shards.shards(engine)
    ]
    replicated = shards.form(engine) not in shards.CUT_FORMS
    found: dict[str, dict[str, torch.Tensor]] = {}
    for views in host.gather(mine)[: 1 if replicated else None]:
        for name, start, shape, tensors in views:
            for key, part in tensors.items():
                full = found.setdefault(name, {}).setdefault(key, torch.full(shape, torch.nan))
                target = full.view(-1)[start : start + part.numel()]
                assert target.isnan().all(), f"{name} {key}: ranks overlap"
                target.copy_(part)
    for name, tensors in found.items():
        assert not any(full.isnan().any() for full in tensors.values()), name
    return found


def contract(choices: dict[str, Any], precision: str) -> list[str]:
    """In each rank: what differs between `shards` and what DeepSpeed says, and how writing through a view takes."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    host = join()
    wrong: list[str] = []
    for name, choice in choices.items():
        config = make(choice, precision)
        engine = build(config)
        train(engine, config, host, 0, 3)
        parameters = dict(engine.model.named_parameters())
        found = whole(engine, host)
        if set(found) != set(parameters):
            wrong.append(f"{name}: parameters {set(found) ^ set(parameters)}")
        for key, tensors in found.items():
            if set(tensors) != {"master", "exp_avg", "exp_avg_sq"}:
                wrong.append(f"{name} {key}: {set(tensors)}")
            if tensors["exp_avg_sq"].sum() == 0:
                wrong.append(f"{name} {key}: no second moment")
        if choice.get("stage", 0) > 0:
            zero: Any = engine.engine.optimizer  # type: ignore[attr-defined]
            if choice["stage"] < 3:  # DeepSpeed 0.19 links states once, when only the first group has any
                zero._hp_optimizer_states_linked = False
                zero._lazy_init_hp_params_optimizer_state()
            for key, parameter in parameters.items():
                theirs = {"master": safe_get_full_fp32_param(parameter)}
                for state in ("exp_avg", "exp_avg_sq"):
                    theirs[state] = safe_get_full_optimizer_state(parameter, state)
                wrong += [f"{name} {key} {s}" for s, value in theirs.items() if not torch.equal(found[key][s], value)]
        with torch.no_grad():
            for view in shards.shards(engine):
                view.master.copy_(torch.arange(view.start, view.stop) % 128)
        shards.refresh(engine)
        for key, tensor in engine.weights():
            if host.rank == 0 and not torch.equal(
                tensor.float().view(-1), (torch.arange(tensor.numel()) % 128).float()
            ):
                wrong.append(f"{name} {key}: what was written did not arrive")
        before = dict(engine.weights())
        train(engine, config, host, 3, 4)  # and an optimizer step goes on from it
        for key, tensor in engine.weights():
            if host.rank == 0 and (torch.equal(tensor, before[key]) or (tensor - before[key]).abs().max() > 1):
                wrong.append(f"{name} {key}: a step did not go on from what was written")
        wrong += [f"{name}: {problem}" for problem in around(engine, config, host)]
    return wrong


def around(engine: Engine, config: Any, host: HostGroup) -> list[str]:
    """What is wrong with how a step is watched: its gradients, its masters, and that what is left out is not."""
    wrong, seen = [], []
    masters: dict[int, torch.Tensor] = {}

    def before(flat: shards.Flat) -> None:
        seen.append(("before", flat.index))
        masters[flat.index] = flat.master.clone()
        gradient = flat.key.grad
        if gradient is None or gradient.dtype != torch.float32 or gradient.numel() != flat.master.numel():
            wrong.append(f"no gradient beside master {flat.index}")
        elif flat.pieces and not gradient.any():
            wrong.append(f"the gradient beside master {flat.index} is zero")

    def after(flat: shards.Flat) -> None:
        seen.append(("after", flat.index))
        if flat.pieces and torch.equal(masters[flat.index], flat.master):
            wrong.append(f"master {flat.index} is as before the step")
        flat.master.fill_(0.25)

    shards.around_step(engine, before, after)
    train(engine, config, host, 4, 5)
    wanted = sorted((when, flat.index) for flat in shards.flats(engine) for when in ("before", "after"))
    if sorted(seen) != wanted:
        wrong.append(f"called {sorted(seen)}, not {wanted}")
    if any(host.rank == 0 and not (tensor == 0.25).all() for _, tensor in list(engine.weights())):
        wrong.append("what was written after the step did not arrive in the working weights")
    own = torch.tensor([sum(view.master.numel() for view in shards.shards(engine))])
    everything = sum(shards.shape_of(parameter).numel() for parameter in engine.model.parameters())
    if int(shards.total(engine, own)) != everything:
        wrong.append(f"{int(shards.total(engine, own))} weights in total, not {everything}")
    return wrong


@pytest.mark.parametrize(("world_size", "precision"), [(1, "fp32"), (2, "bf16")])
def test_views_are_what_deepspeed_says(world_size: int, precision: str) -> None:
    for wrong in run_ranks(f"{__name__}:contract", world_size, {"choices": CHOICES, "precision": precision}):
        assert not wrong
