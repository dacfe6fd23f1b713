"""Tier B: the real DeepSpeed engine as rank 0 of N, optimizer steps included, on tensors that have no memory.

torch's `fake` process group answers every collective at once, and FakeTensorMode gives every operator's result its
shape and no storage, so that any model at any world size runs in one process. What is held moment by moment is then
counted as in a real run and put beside the closed form. Runs in a process of its own: torch and DeepSpeed are changed
for it. The attention and norms are those that torch has for CPUs, and so are those of the closed form beside it.

    python -m bigtrain.plan.traced CONFIG.yaml RANKS      prints JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain import config as schema
from bigtrain import foreign
from bigtrain.config import Config, DeepSpeedConfig, micro_batch
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.plan import memory, sizes
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.result import GIB

MOST_RANKS = 8  # traced: a ZeRO-3 trace takes longer the more there are, and the closed form knows how shares scale
MOMENTS = {"loss": "forward", "backward": "backward", "update": "step"}
LIMIT_SECONDS = 900


@dataclass(frozen=True)
class Compared:
    """Predicted against traced."""

    ranks: int
    batch: str
    rows: dict[str, tuple[int, int]]  # part or moment -> predicted and traced bytes

    def to_dict(self) -> dict[str, Any]:
        """In GiB."""
        rows = {name: {"predicted": mine / GIB, "traced": real / GIB} for name, (mine, real) in self.rows.items()}
        return {"ranks": self.ranks, "stepped": True, "gib": rows}

    def __str__(self) -> str:
        lines = [f"verify: DeepSpeed's own engine as rank 0 of {self.ranks}, {self.batch}"]
        lines += [f"  {'':20}{'predicted MiB':>15}{'traced MiB':>13}{'error':>9}"]
        for name, (predicted, real) in self.rows.items():
            error = f"{predicted / real - 1:+9.2%}" if real else f"{'':9}"
            lines.append(f"  {name:20}{predicted / 2**20:15,.1f}{real / 2**20:13,.1f}{error}")
        return "\n".join([*lines, "  an optimizer step was made"])


def compare(config: Config, cluster: Cluster) -> Compared:
    """Predicted against traced, part by part. Raises BigtrainError if the trace fails or made no step."""
    if not isinstance(config.engine, DeepSpeedConfig):
        raise ConfigError("verify", True, f"engine={config.engine.kind} is not traced", "take engine=zero2 or another")
    config = sizes.with_vocabulary(config)
    ranks = min(cluster.devices, MOST_RANKS)
    each, accumulation = micro_batch(config, cluster.devices), schema.accumulation_steps(config, cluster.devices)
    train = replace(config.train, micro_batch=each, global_batch=each * accumulation * ranks, compile=False)
    found = trace(replace(config, train=train), ranks)
    if not found["stepped"]:
        raise BigtrainError("verify: the traced engine skipped its optimizer step, so its peak says nothing")
    return Compared(ranks, f"{accumulation} micro-batches of {each} a step", found["rows"])


def trace(config: Config, ranks: int) -> dict[str, Any]:
    """`rows`: part or moment -> (predicted, traced) bytes; `stepped`. In a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(schema.dump(config), encoding="utf-8")
        environment = foreign.without(os.environ) | {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "DS_ACCELERATOR": "cpu", "BIGTRAIN_CPU_KERNELS": "0",
        }  # fmt: skip
        command = [sys.executable, "-m", __name__, str(file), str(ranks)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise BigtrainError(f"verify: the trace took more than {LIMIT_SECONDS} s; trace a smaller model") from None
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise BigtrainError(f"verify: the trace failed ({last})")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rehearse_without_memory(config: Config, ranks: int) -> Any:
    """plan/rehearsal.py's steps under FakeTensorMode and the fake process group."""
    import torch
    import torch.nn.functional as F
    from deepspeed.runtime.zero import utils as zero_utils
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode

    from bigtrain.plan import rehearsal

    aten = torch.ops.aten

    class Answers(TorchDispatchMode):
        """Numbers that the host reads: 0, with which nothing overflows, and ranks that agree."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is aten._local_scalar_dense.default:
                kind = args[0].dtype
                return False if kind == torch.bool else 0.0 if kind.is_floating_point else 0
            if function is aten.equal.default:
                return True
            return function(*args, **(kwargs or {}))

    def attention(
        q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False, **_: Any
    ) -> Any:
        """On tensors without memory torch would take the plain formula, which keeps the scores."""
        if dropout:
            return plain(q, k, v, mask, dropout, causal)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, causal, attn_mask=mask)[0]

    plain, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention  # type: ignore[assignment]

    def as_it_is(module: Any, *_: Any, **__: Any) -> Any:
        """A parameter without memory cannot change its type in place: the model is built in the right one."""
        return module

    for name in ("to", "bfloat16", "half", "float"):
        setattr(torch.nn.Module, name, as_it_is)
    # ZeRO-3 has the ranks compare lists of numbers, which the host cannot read here: there is one rank to agree with.
    zero_utils.get_lst_from_rank0 = list
    zero_utils.assert_lst_len_same_as_other_ranks = len
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with FakeTensorMode(allow_non_fake_inputs=True), Answers():
        return rehearsal.rehearse(config, torch.device("cpu"), in_precision=True)


def main() -> None:
    config, ranks = schema.load(sys.argv[1]), int(sys.argv[2])
    plan = memory.estimate(config, ranks, sizes.of_run(config), "cpu")
    found = rehearse_without_memory(config, ranks)
    rows = {name: (plan.states.get(name, 0), size) for name, size in found.parts.items()}
    rows |= {moment.name: (moment.total, found.phases[MOMENTS[moment.name]])
             for moment in plan.moments if moment.name in MOMENTS}  # fmt: skip
    rows["peak"] = (plan.certain.total, found.peak)
    print(json.dumps({"rows": rows, "stepped": found.stepped}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
