"""A look inside some steps: torch's profiler, what the ranks said to each other, and DeepSpeed's count of operations.

RUN_DIR/profile/ then has, of rank N: trace-rank-N.json.gz (chrome://tracing, Perfetto), operators-rank-N.txt,
communication-rank-N.json, and of rank 0 flops.txt. Steps that are looked at take longer, and say so in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain.config import ProfileConfig
from bigtrain.files import write_atomic

logger = logging.getLogger(__name__)

FOLDER = "profile"
ROWS = 40  # of the table of operators
# What collectives are called in a trace: by their backend, and by the dispatcher that gives them to it.
_COLLECTIVES = ("nccl:", "gloo:", "mpi:", "ucc:")


class Profiler:
    """Told before every step; does nothing outside of its window, and nothing that the steps would notice in it.

    The steps after `start_step` are traced, `steps` of them; the one after those is what operations are counted in.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, rank: int, model: nn.Module) -> None:
        self.config, self.folder, self.rank, self.model = config, run_dir / FOLDER, rank, model
        self.wanted = config.steps > 0 and (rank == 0 or config.all_ranks)
        self._trace: Any = None
        self._flops: Any = None

    def before(self, step: int) -> None:
        """The step after `step` is about to begin."""
        if not self.wanted:
            return
        first, last = self.config.start_step, self.config.start_step + self.config.steps
        with self._survived():
            if self._trace is not None and step >= last:
                self._end_trace()
            if self._flops is not None and step > last:
                self._end_flops(step)
            if step == first and self._trace is None:
                self._begin_trace()
            if step == last and self.config.flops and self.rank == 0 and self._flops is None:
                self._begin_flops()

    def close(self, step: int) -> None:
        """The last step is done."""
        with self._survived():
            if self._trace is not None:
                self._end_trace()
            if self._flops is not None:
                self._end_flops(step)

    @contextlib.contextmanager
    def _survived(self) -> Any:
        """Looking at a run must not end it."""
        try:
            yield
        except Exception as error:
            logger.warning("the profiler failed and is switched off: %s: %s", type(error).__name__, error)
            self.wanted, self._trace, self._flops = False, None, None

    def _begin_trace(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._trace = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=self.config.memory, with_stack=self.config.stacks
        )
        self._trace.start()

    def _end_trace(self) -> None:
        trace, self._trace = self._trace, None
        trace.stop()
        self.folder.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(self.folder / f"trace-rank-{self.rank}.json.gz"))
        averages = trace.key_averages()
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        write_atomic(self.folder / f"operators-rank-{self.rank}.txt", averages.table(sort_by=by, row_limit=ROWS) + "\n")
        said = {"steps": self.config.steps, "collectives": collectives(trace.key_averages(group_by_input_shape=True))}
        write_atomic(self.folder / f"communication-rank-{self.rank}.json", json.dumps(said, indent=1) + "\n")

    def _begin_flops(self) -> None:
        from deepspeed.profiling.flops_profiler import FlopsProfiler

        self._flops = FlopsProfiler(self.model)
        self._flops.start_profile()

    def _end_flops(self, step: int) -> None:
        flops, self._flops = self._flops, None
        try:
            self.folder.mkdir(exist_ok=True)
            flops.print_model_profile(profile_step=step, output_file=str(self.folder / "flops.txt"))
        finally:
            flops.end_profile()


def collectives(averages: Iterable[Any]) -> list[dict[str, Any]]:
    """Per collective and shape: how often, how long in all and at the longest on average (seconds), the longest first.

    The time of one includes the wait for the slowest rank.
    """
    rows = []
    for event in averages:
        if str(event.key).startswith(_COLLECTIVES):
            device = float(getattr(event, "device_time_total", 0.0) or 0.0)
            microseconds = device or float(event.cpu_time_total)
            rows.append({
                "name": event.key, "shapes": event.input_shapes, "calls": event.count,
                "seconds": microseconds / 1e6, "seconds_per_call": microseconds / 1e6 / max(1, event.count),
            })  # fmt: skip
    return sorted(rows, key=lambda row: -row["seconds"])
