"""Print what a launch would do: its command, environment and effective engine config. Starts and writes nothing."""

from __future__ import annotations

import json
import shlex

from bigtrain.config import Config, DeepSpeedConfig
from bigtrain.hardware import Placement
from bigtrain.launch import local
from bigtrain.redact import redact


def show(config: Config, placement: Placement) -> str:
    """A shell script: it would start the same ranks once `bigtrain train` has written run_dir/config.yaml."""
    digest = f"$(cat {shlex.quote(config.run_dir + '/config.sha256')})"  # of a file that only a real run writes
    start = local.start_of(config, placement, digest)
    lines = [f"# {placement.ranks} ranks on {placement.device}, {placement.threads_per_rank} threads each"]
    lines += [f"unset {' '.join(start.removed)}"]
    environment = redact(start.environment, start.environment)
    del environment["BIGTRAIN_PARENT_PID"]  # the ranks end with this process: here, whoever runs the script
    lines += ["export BIGTRAIN_PARENT_PID=$$"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += [" ".join(f'"{word}"' if word == digest else shlex.quote(word) for word in start.command)]
    if isinstance(config.engine, DeepSpeedConfig):
        from bigtrain.engine.deepspeed import ds_config  # imports torch: only here in the parent, and only when asked

        effective = json.dumps(redact(ds_config(config, placement.ranks, placement.device)), indent=2)
        lines += ["", "# effective DeepSpeed config", *(f"# {line}" for line in effective.splitlines())]
    return "\n".join(lines)
