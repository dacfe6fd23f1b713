"""Every process group has the configured timeout, whoever makes it."""

from __future__ import annotations

from tests.distributed.ranks import run_ranks


def timeouts() -> list[float]:
    """Seconds, of the world's group and of those that ZeRO, FSDP2 and a caller with a wish of its own make."""
    import datetime

    import deepspeed
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from bigtrain.engine import start

    start.init_distributed("cpu", 77)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    groups = [
        torch.distributed.group.WORLD,
        deepspeed.comm.new_group([0, 1]),
        init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b")).get_group("a"),
        torch.distributed.new_group(timeout=datetime.timedelta(seconds=5)),
    ]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]  # type: ignore[union-attr]


def test_every_group_has_the_configured_timeout() -> None:
    assert run_ranks(f"{__name__}:timeouts", 2) == [[77, 77, 77, 5]] * 2
