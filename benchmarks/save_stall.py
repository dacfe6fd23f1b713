"""What saving costs: how long one save holds training up, and how much slower steps are while it is being written.

    python benchmarks/save_stall.py                                  # GPT-2 124M, ZeRO-2, two ranks, bf16: some minutes
    python benchmarks/save_stall.py model=gpt_1m model.vocab_size=4096    # to try the benchmark itself

Settings are bigtrain's own. The same run saves in the background and then synchronously (train.async_save). From its
metrics.jsonl: "blocked" is wall time between two saves that was no step's, "slower" what the steps in it took beyond
as many medians (the writer shares the ranks' cores). The share of time that goes into saving is for the interval of
the recipe for this model (experiment=gpt2_124m saves every 1,000 steps), at this machine's own step time. The last
column is the shortest interval at which saving is blocked for no more than 1% (async) or 3.5% (sync) of the time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import checkpoints

DEFAULTS = [
    "model=gpt2_124m", "engine=zero2", "data=stdlib", "schedule=constant", "schedule.warmup_steps=0", "logger=quiet",
    "model.max_seq_len=512", "train.global_batch=4", "train.micro_batch=2", "train.precision=bf16", "launch.ranks=2",
    "train.eval_every=0", "train.eval_batches=1", "logger.log_every=1", "train.keep_checkpoints=2",
]  # fmt: skip
INTERVAL = 1000  # of conf/experiment/gpt2_124m.yaml
ALLOWED = {"async": 0.01, "sync": 0.035}
WARM = 2  # steps


@dataclass(frozen=True)
class Cost:
    """Of one save, in seconds."""

    blocked: float
    slower: float
    step: float  # of a step that nothing is written beside

    def share(self, interval: int) -> float:
        """Of all time that training is blocked, with a save every `interval` steps."""
        return self.blocked / (interval * self.step + self.blocked)

    def shortest(self, share: float) -> int:
        """The interval, in steps, at which no more than `share` of the time is blocked."""
        return math.ceil(self.blocked * (1 - share) / share / self.step)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="settings, as on bigtrain's command line")
    parser.add_argument("--every", type=int, default=6, help="steps between the saves that are measured")
    arguments = parser.parse_args()
    for mode in ALLOWED:
        with tempfile.TemporaryDirectory(dir=".", prefix="save_stall-") as folder:
            report(mode, train(Path(folder) / "run", mode, arguments.every, arguments.overrides), arguments.every)


def train(run: Path, mode: str, every: int, overrides: list[str]) -> Path:
    """Saves after `every` and twice as many steps, and at the end, which is not looked at: nothing follows it."""
    command = [
        sys.executable, "-m", "bigtrain.cli", "train", *DEFAULTS, *overrides, f"run_dir={run}",
        f"train.steps={3 * every - 1}", f"train.save_every={every}", f"train.async_save={mode == 'async'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-2000:])
    return run


def cost(rows: list[dict[str, Any]], every: int) -> Cost:
    """From the rows of metrics.jsonl, one for each step; a step's row is written before its save begins."""
    after = [row for row in rows if row["step"] > every]
    seconds = [row["perf/step_seconds"] for row in after]
    wall = after[-1]["time"] - rows[every - 1]["time"]
    step = statistics.median([row["perf/step_seconds"] for row in rows[WARM:]])
    saves = (len(after) + 1) / every
    return Cost((wall - sum(seconds)) / saves, (sum(seconds) - len(seconds) * step) / saves, step)


def report(mode: str, run: Path, every: int) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = cost([row for row in rows if "perf/step_seconds" in row], every)
    result = json.loads((run / "result.json").read_text())
    newest = checkpoints(run)[-1]
    print(
        f"{mode:5}  a checkpoint of {newest.bytes / 2**20:,.0f} MiB; step {found.step:.2f} s; one save: blocked"
        f" {found.blocked:.2f} s, slower steps {found.slower:+.2f} s; with one every {INTERVAL:,} steps"
        f" {found.share(INTERVAL):.2%} of the time is blocked ({ALLOWED[mode]:.1%} from every"
        f" {found.shortest(ALLOWED[mode]):,} steps on); result.json: {result['time/save_stall_seconds']:.2f} s"
        " for three saves, the last one waited for",
        flush=True,
    )


if __name__ == "__main__":
    main()
