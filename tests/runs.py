"""Real runs for tests: the command as a user types it, on a model that trains in a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TINY = ["experiment=tiny", "logger.progress=false"]  # 0.1M parameters, 20 steps, fp32, two ranks


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bigtrain.cli", *arguments]


def bigtrain(*arguments: str, cwd: Path | None = None, expect: int = 0, timeout: float = 600) -> str:
    """Run the command to its end; its output. Fails unless it exits with `expect`."""
    done = subprocess.run(
        command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )
    output = done.stdout + done.stderr
    assert done.returncode == expect, f"exit status {done.returncode}, not {expect}:\n{output}\n{_logs(arguments)}"
    return output


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
