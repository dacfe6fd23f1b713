"""Variables that other launchers leave in the environment of what they start: torchrun, accelerate, mpirun, SageMaker.

A run inside such an environment (a notebook, a job script, another run) must come out as it does elsewhere, but torch,
deepspeed, accelerate and transformers heed them: TORCHELASTIC_USE_AGENT_STORE lets every rank wait for a store that
nobody has, ACCELERATE_GRADIENT_ACCUMULATION_STEPS and FSDP_* count for more than arguments. What is meant for the ranks
stands in launch.env. Imports nothing, for it runs before each rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Who a process is among others, as torch and deepspeed have it.
IDENTITY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE",
            "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "NODE_RANK",
            "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
TORCHRUN = ("TORCHELASTIC_", "TORCH_ELASTIC_", "PET_")
MPI = ("OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "PMI_", "PMIX_", "MV2_COMM_WORLD_", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
       "HOROVOD_")  # fmt: skip
# How to train, in the words of somebody who is not asked: `accelerate launch` and SageMaker.
SETTINGS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FORK_LAUNCHED", "XLA_USE_BF16",
            "XLA_DOWNCAST_BF16", "SM_", "SMDATAPARALLEL_")  # fmt: skip


def found(names: Iterable[str]) -> list[str]:
    """Those of `names` that another launcher's variables have, in order."""
    return sorted(name for name in names if name in IDENTITY or name.startswith((*TORCHRUN, *MPI, *SETTINGS)))


def settings(names: Iterable[str]) -> list[str]:
    """Those that would have said how to train, in order."""
    return [name for name in found(names) if name.startswith(SETTINGS)]


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` as it would be if no other launcher had been there."""
    left = set(found(environment))
    return {name: value for name, value in environment.items() if name not in left}


def for_rank(environment: Mapping[str, str], by_torchrun: bool) -> dict[str, str]:
    """`environment` of a rank, with the words of whoever started it and no others'."""
    others = SETTINGS + (() if by_torchrun else TORCHRUN) + (MPI if "RANK" in environment else ())
    return {name: value for name, value in environment.items() if not name.startswith(others)}
