"""Which variables a run takes with it to other machines.

Their values travel inside an ssh or srun connection and then lie in a file for their owner alone: never on a command
line, where everybody's `ps` shows them and a shell would take them apart."""

from __future__ import annotations

import os
from pathlib import Path

from bigtrain.config import Config

PREFIXES = ("WANDB_", "HF_", "NCCL_", "GLOO_", "DS_", "TORCH_", "UCX_", "FI_", "MLFLOW_", "BIGTRAIN_", "OMP_", "KMP_")
NAMES = ("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_CACHE_HOME", "TOKENIZERS_PARALLELISM", "GLIBC_TUNABLES",
         "CUDA_HOME", "http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy",
         "HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY")  # fmt: skip
# Each rank has its own, or this machine's would mislead another.
_OWN = ("DS_ENV_FILE", "DS_ACCELERATOR", "BIGTRAIN_PARENT_PID", "BIGTRAIN_LAUNCH_ID",
        "BIGTRAIN_HELD_BACK", "BIGTRAIN_RESTARTS")  # fmt: skip
DEEPSPEED_ENV = ".deepspeed_env"  # what users of the deepspeed launcher keep there is taken along


def forwarded(config: Config) -> dict[str, str]:
    """This process's variables that go to every rank: the known names, those of launch.forward, ~/.deepspeed_env's,
    and over them all launch.env."""
    taken = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(PREFIXES) or name in NAMES or name in config.launch.forward) and name not in _OWN
    }
    return deepspeed_env() | taken | config.launch.env


def deepspeed_env() -> dict[str, str]:
    """`name=value` lines of the file that the deepspeed launcher would read (and trip over its blank lines)."""
    found: dict[str, str] = {}
    for folder in (Path("~"), Path()):
        try:
            lines = (
                (folder.expanduser() / os.environ.get("DS_ENV_FILE", DEEPSPEED_ENV))
                .read_text(encoding="utf-8")
                .splitlines()
            )
        except (OSError, UnicodeDecodeError, RuntimeError):  # no home directory
            continue
        for line in lines:
            name, equals, value = line.partition("=")
            if equals and not line.lstrip().startswith("#"):
                found[name.strip()] = value.strip()
    return found
