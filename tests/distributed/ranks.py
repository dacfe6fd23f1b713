"""Run a function on several real gloo ranks, each a process of its own, and collect what each returns."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bigtrain.launch import ops

ROOT = Path(__file__).parents[2]


def run_ranks(target: str, world_size: int, arguments: dict[str, Any] | None = None, timeout: float = 300) -> list[Any]:
    """`target` is "module:function"; it gets `arguments` (JSON-able) as keywords and returns something JSON-able.

    Raises AssertionError with the ranks' output if any of them fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    extensions = ops.extensions_dir()
    ops.remove_stale_locks(extensions)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "TORCH_EXTENSIONS_DIR": str(extensions),
                "PATH": ops.search_path(),
            }
            log = open(Path(folder) / f"{rank}.log", "w+")  # noqa: SIM115  (read back below)
            command = [sys.executable, "-m", __name__, target, json.dumps(arguments or {}), f"{folder}/{rank}.json"]
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
            processes.append((process, log))
        try:
            codes = [process.wait(timeout) for process, _ in processes]
        finally:
            for process, _ in processes:
                process.kill()
        output = ""
        for rank, (_, log) in enumerate(processes):
            log.seek(0)
            output += f"--- rank {rank}\n{log.read()[-4000:]}\n"
            log.close()
        assert codes == [0] * world_size, f"exit codes {codes}\n{output}"
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(world_size)]


def main() -> None:
    target, arguments, result = sys.argv[1:]
    module, function = target.split(":")
    value = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    Path(result).write_text(json.dumps(value))
    sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.barrier()  # or a rank that is still in its last collective would lose its peer
    os._exit(0)  # as bigtrain's own ranks end


if __name__ == "__main__":
    main()
