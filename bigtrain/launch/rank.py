"""`python -m bigtrain.launch.rank --files DIR` or `... CONFIG --sha256 HEX`: becomes one rank, whoever started it.

The deepspeed launcher, srun, mpirun, torchrun and a container's shell each say in their own words which rank this is.
DIR/rank-N.json (for its owner alone, written by this node's agent) holds the rank's arguments, directory and
environment: nothing of them is on a command line. Python starts anew as bigtrain.worker in this same process, because
some of the environment (glibc's, PYTHONPATH) counts only from the start. Imports nothing heavy. What launchers other
than the one that started it have left in the environment is taken away (foreign.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from bigtrain import foreign

# The names of (rank, local rank, world size, ranks on this node), by launcher; torchrun and deepspeed first.
_NAMES = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
)


def identity(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK and WORLD_SIZE as torch wants them. Raises KeyError if no launcher has said."""
    for rank, local_rank, world_size, _ in _NAMES:
        if rank in environment and world_size in environment:
            return {
                "RANK": environment[rank],
                "LOCAL_RANK": environment.get(local_rank, "0"),
                "WORLD_SIZE": environment[world_size],
            }
    raise KeyError("RANK")


def _by_torchrun(arguments: list[str]) -> bool:
    """Whether the config that this rank is to read says launch=torchrun: then torchrun's own words count."""
    if arguments[:1] == ["--files"]:
        return False
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, LookupError, TypeError):  # the worker will say why
        return bool(yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))["launch"]["kind"] == "torchrun")
    return False


def main() -> None:
    arguments = sys.argv[1:]
    try:
        environment = foreign.for_rank(os.environ, _by_torchrun(arguments)) | identity(os.environ)
    except KeyError:
        sys.exit("bigtrain: error: no launcher has said which rank this is: RANK and WORLD_SIZE are not set")
    if arguments[:1] == ["--files"]:
        path = Path(arguments[1]) / f"rank-{environment['RANK']}.json"
        try:
            start = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            sys.exit(f"bigtrain: error: rank {environment['RANK']} was not meant for {os.uname().nodename}: no {path}")
        environment |= start["environment"]
        arguments = start["arguments"]
        os.chdir(start["directory"])
    os.execve(sys.executable, [sys.executable, "-u", "-m", "bigtrain.worker", *arguments], environment)


if __name__ == "__main__":
    main()
