"""All-reduce between two nodes, measured: `python -m bigtrain.launch.bandwidth`, one process on each, as rank 0 and 1.

Latency is that of the smallest message, bandwidth that of the largest: bytes over seconds, which for two ranks is the
bus bandwidth that nccl-tests report. The middle one of several tries counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from bigtrain import foreign

TRIES, WARM_UP = 9, 3
SMALLEST, LARGEST = 4, 16 * 2**20  # bytes
TIMEOUT_SECONDS = 120


def start(environment: dict[str, str], launch_id: dict[str, str]) -> subprocess.Popen[bytes]:
    """This node's part; `collect` has its result once it is there."""
    return subprocess.Popen(
        [sys.executable, "-m", "bigtrain.launch.bandwidth"], env=foreign.without(os.environ) | environment | launch_id,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def collect(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """What it measured, or why it could not; None while it runs."""
    if process.poll() is None:
        return None
    out, error = process.communicate()
    try:
        found: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
        return found
    except (ValueError, IndexError):
        lines = error.decode(errors="replace").strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {process.returncode}"}


def main() -> None:
    import torch
    import torch.distributed as dist

    cuda = os.environ["DS_ACCELERATOR"] == "cuda"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    seconds = {}
    for size in (SMALLEST, LARGEST):
        tensor = torch.ones(size // 4, device=device)
        taken = []
        for _ in range(WARM_UP + TRIES):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            if cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        seconds[size] = statistics.median(taken[WARM_UP:])
    print(json.dumps({"latency_us": seconds[SMALLEST] * 1e6, "gb_per_second": LARGEST / seconds[LARGEST] / 1e9}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
