"""Real runs for tests: the command as a user types it, on a model that trains in a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import forked
from tests.distributed import ranks

# 0.1M parameters, 20 steps, fp32, two ranks; the evaluation at the end is of 1% of the text instead of 5.
TINY = ["experiment=tiny", "logger.progress=false", "data.held_out=0.01"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bigtrain.cli", *arguments]


def bigtrain(
    *arguments: str, cwd: Path | None = None, expect: int = 0, timeout: float = 600, fresh: bool = False
) -> str:
    """Run the command to its end; its output. Fails unless it exits with `expect`.

    Its processes are forked (tests/forked.py says what that shows and what not); with `fresh` they are started.
    """
    status, output = (_started if fresh else _forked)(arguments, cwd, timeout)
    assert status == expect, f"exit status {status}, not {expect}:\n{output}\n{_logs(arguments)}"
    return output


def _started(arguments: tuple[str, ...], cwd: Path | None, timeout: float) -> tuple[int, str]:
    done = subprocess.run(
        command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout + done.stderr


def _forked(arguments: tuple[str, ...], cwd: Path | None, timeout: float) -> tuple[int, str]:
    running = Running(*arguments, cwd=cwd)
    try:
        out, err = running.communicate(timeout)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
        raise
    return running.wait(), out + err


class Running:
    """A command that is forked and goes on, in a session of its own; with what of a Popen tests use."""

    def __init__(self, *arguments: str, cwd: Path | None = None) -> None:
        self._arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        self._written = [Path(self._folder.name, name) for name in ("out", "err")]
        files = map(str, self._written)
        self._process = ranks.fork(forked.run, list(arguments), dict(os.environ), str(cwd or os.getcwd()), *files)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(command(*self._arguments), timeout)
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and standard error, once it has ended."""
        self.wait(timeout)
        return self.said()

    def said(self) -> tuple[str, str]:
        """So far."""
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self._written)
        return out, err

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _logs(arguments: tuple[str, ...]) -> str:
    for argument in arguments:
        if argument.startswith("run_dir="):
            logs = sorted(Path(argument.removeprefix("run_dir=")).glob("logs/*.log"))
            return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs)
    return ""


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in metrics(run) if "train/loss" in line}


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def process_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
