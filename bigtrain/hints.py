"""What to type next: the commands that take a run of a task."""

from __future__ import annotations

import shlex

WRITERS = ("causal_lm", "instruction", "translation")  # tasks of models that write text, which `generate` takes


def next_commands(task: str, run: str) -> dict[str, str]:
    """{what for: command} after a run of `task`, the most telling first."""
    run = shlex.quote(run)
    if task == "translation":
        first = {"translate": f"bigtrain generate {run} < FILE"}
    elif task in WRITERS:
        first = {"generate": f'bigtrain generate {run} --prompt "..."'}
    else:
        first = {"evaluate": f"bigtrain evaluate {run}"}
    return first | {"report": f"bigtrain report {run}"}
