"""What other launchers leave in the environment reaches no rank."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from bigtrain import foreign
from bigtrain.config import Config, LaunchConfig
from bigtrain.hardware import Placement
from bigtrain.launch import local
from bigtrain.launch.rank import _by_torchrun

LEFT = {
    "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "GROUP_RANK": "0", "ROLE_NAME": "default",
    "MASTER_ADDR": "10.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x",
    "OMPI_COMM_WORLD_RANK": "1", "PMI_SIZE": "4", "PMIX_RANK": "1", "HOROVOD_RANK": "1",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "fp16", "FSDP_OFFLOAD_PARAMS": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2", "MEGATRON_LM_TP_DEGREE": "2", "SM_HP_MP_PARAMETERS": "{}",
}  # fmt: skip
KEPT = {
    "PATH": "/bin", "NCCL_DEBUG": "INFO", "OMPI_MCA_btl": "tcp", "SLURM_JOB_ID": "7", "WANDB_NAME": "a",
    "HF_HOME": "/h", "OMP_PROC_BIND": "close", "TORCH_EXTENSIONS_DIR": "/t", "SMALL": "1",
}  # fmt: skip


def test_a_launch_takes_away_what_others_left_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert foreign.found(LEFT | KEPT) == sorted(LEFT)
    assert foreign.without(LEFT | KEPT) == KEPT
    for name, value in (LEFT | KEPT).items():
        monkeypatch.setenv(name, value)
    config = Config(launch=LaunchConfig(env={"ACCELERATE_MIXED_PRECISION": "no"}))
    start = local.start_of(config, Placement("cpu", 1, 1, ()), "0")
    assert set(LEFT) <= set(start.removed)
    assert not set(KEPT) & set(start.removed)
    assert start.environment["ACCELERATE_MIXED_PRECISION"] == "no"  # what is asked for by name is there


def test_a_rank_hears_only_who_started_it() -> None:
    torchrun = foreign.for_rank(LEFT | KEPT, by_torchrun=True)
    assert torchrun["TORCHELASTIC_USE_AGENT_STORE"] == "True"  # else it would open a store where torchrun's is
    assert not {"OMPI_COMM_WORLD_RANK", "ACCELERATE_MIXED_PRECISION", "FSDP_OFFLOAD_PARAMS"} & set(torchrun)
    deepspeed = foreign.for_rank(LEFT | KEPT, by_torchrun=False)
    assert deepspeed.keys() == torchrun.keys() - {"TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"}
    assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", *KEPT} <= deepspeed.keys()
    mpirun = {name: value for name, value in LEFT.items() if name not in foreign.IDENTITY}
    assert foreign.for_rank(mpirun, by_torchrun=False)["OMPI_COMM_WORLD_RANK"] == "1"


def test_the_config_says_whether_torchrun_started_the_ranks(tmp_path: Path) -> None:
    for kind in ("torchrun", "manual"):
        file = tmp_path / "config.yaml"
        file.write_text(f"launch:\n  kind: {kind}\n")
        assert _by_torchrun([str(file), "--sha256", "0"]) == (kind == "torchrun")
    assert not _by_torchrun(["--files", "/dev/shm/x"])
    assert not _by_torchrun([str(tmp_path / "none")])
    assert not _by_torchrun([])


def test_all_that_accelerate_reads_of_the_environment_is_known() -> None:
    """A new version of it may have new words."""
    spec = find_spec("accelerate")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    text = "".join((folder / name).read_text() for name in ("accelerator.py", "state.py", "utils/dataclasses.py"))
    read = set(re.findall(r'(?:environ\.get|environ|parse_flag_from_env|parse_choice_from_env)[(\[]\s*"(\w+)"', text))
    harmless = {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}  # and what is of other hardware
    harmless |= {"DEEPSPEED_USE_HPU", "PT_HPU_LAZY_MODE", "PYTORCH_ENABLE_MPS_FALLBACK"}
    assert len(read) > 20
    assert read - set(foreign.found(read)) <= harmless
