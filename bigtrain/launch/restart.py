"""Whether a launch that failed is started again, from which checkpoint, and when to give up."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from bigtrain.checkpoint.find import MANIFEST, Checkpoint, checkpoints
from bigtrain.config import Config
from bigtrain.errors import BigtrainError
from bigtrain.launch.cause import FAILURES, Cause, failure_files

RECORD = "restarts.jsonl"  # in the run directory: a line for each restart of the run's life


class Restarts:
    """Counts the failures of one command since the run last got further: since it last wrote a checkpoint."""

    def __init__(self, config: Config) -> None:
        self.run_dir, self.limit = Path(config.run_dir), config.launch.restarts
        self.resume = config.resume
        self.started = time.time()
        self.last_saved = self._saved_step()
        self.causes: list[Cause] = []
        self.ran = False  # whether the ranks of this command have ever taken a step

    @property
    def total(self) -> int:
        """Over the life of the run."""
        try:
            return len((self.run_dir / RECORD).read_text(encoding="utf-8").splitlines())
        except OSError:
            return 0

    def again(self, cause: Cause, ran: bool) -> str:
        """Count one more failure; the line that says why and from where the ranks start again.

        `ran`: they had taken a step. Raises BigtrainError, in one line, if they are not to start again: the cause is
        the user's to mend, nothing ever ran here, or `launch.restarts` restarts brought no new checkpoint.
        """
        saved = self._saved_step()
        if saved != self.last_saved:
            self.causes, self.last_saved = [], saved
        self.causes.append(cause)
        self.ran = self.ran or ran
        if cause.users or not self.limit or (cause.reported and not self.ran):
            raise BigtrainError(cause.line)
        if len(self.causes) > self.limit:
            raise BigtrainError(self._repeats())
        where = f"the checkpoint of step {saved}" if saved is not None else "the beginning, there is no checkpoint yet"
        line = f"{cause.text}; restart {len(self.causes)} of {self.limit} from {where}"
        self._record(cause, saved)
        return line

    def resumed(self, config: Config) -> Config:
        """`config` for the next start: from the newest checkpoint that this command wrote, else as it was asked for."""
        if self.resume in ("auto", "required"):
            return config
        written = [(time, found) for found in checkpoints(self.run_dir) if (time := _written(found)) >= self.started]
        if written:  # a step-N with a higher N may be left of what resume=PATH went back behind
            return replace(config, resume=str(max(written, key=lambda pair: pair[0])[1].path))
        return config

    def _saved_step(self) -> int | None:
        found = checkpoints(self.run_dir)
        return found[-1].step if found else None

    def _repeats(self) -> str:
        counts = Counter(cause.what for cause in self.causes).most_common()
        kinds = ", ".join(what if len(counts) == 1 else f"{count} x {what}" for what, count in counts)
        since = (
            f"after the checkpoint of step {self.last_saved}" if self.last_saved is not None else "without a checkpoint"
        )
        each = "each time" if len(counts) == 1 else "in all"
        return (
            f"gave up: {len(self.causes)} failures {since}, launch.restarts={self.limit} restarts brought no new one;"
            f" {each}: {kinds}; the last: {self.causes[-1].line}"
        )

    def _record(self, cause: Cause, saved: int | None) -> None:
        """A line in restarts.jsonl; what the ranks reported moves into failures/restart-N/."""
        kept = self.run_dir / FAILURES / f"restart-{self.total + 1}"
        for path in failure_files(self.run_dir):
            kept.mkdir(exist_ok=True)
            path.replace(kept / path.name)
        line = {"time": round(time.time(), 3), "cause": cause.line, "checkpoint_step": saved}
        with open(self.run_dir / RECORD, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _written(checkpoint: Checkpoint) -> float:
    try:
        return (checkpoint.path / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0
