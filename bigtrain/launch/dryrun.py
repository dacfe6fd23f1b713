"""Print what a launch would do: its command, environment and effective engine config. Starts and writes nothing."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from bigtrain.config import Config, DeepSpeedConfig
from bigtrain.hardware import Placement
from bigtrain.launch import local
from bigtrain.redact import redact

if TYPE_CHECKING:
    from bigtrain.launch.layout import Layout


def show(config: Config, placement: Placement) -> str:
    """A shell script: it would start the same ranks once `bigtrain train` has written run_dir/config.yaml."""
    digest = f"$(cat {shlex.quote(config.run_dir + '/config.sha256')})"  # of a file that only a real run writes
    start = local.start_of(config, placement, digest)
    lines = [heading(placement)]
    lines += [f"unset {' '.join(start.removed)}"]
    environment = redact(start.environment, start.environment)
    del environment["BIGTRAIN_PARENT_PID"]  # the ranks end with this process: here, whoever runs the script
    lines += ["export BIGTRAIN_PARENT_PID=$$"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += [" ".join(f'"{word}"' if word == digest else shlex.quote(word) for word in start.command)]
    return "\n".join(lines + effective(config, placement))


def across(config: Config, placement: Placement, layout: Layout, words: list[str]) -> str:
    """What starts the ranks on several nodes, and what each of them is told."""
    from bigtrain.launch.layout import rank_environment

    lines = [heading(placement), f"# nodes: {', '.join(layout.hosts)}", shlex.join(words), ""]
    lines += [f"# {layout.files}/rank-0.json on {layout.hosts[0]}, for its owner alone, holds its environment:"]
    environment = rank_environment(config, placement, layout, 0)
    lines += [f"# {name}={shlex.quote(value)}" for name, value in redact(environment, environment).items()]
    return "\n".join(lines + effective(config, placement))


def heading(placement: Placement) -> str:
    nodes = f"{placement.nodes} nodes x " if placement.nodes > 1 else ""
    return f"# {nodes}{placement.ranks} ranks on {placement.device}, {placement.threads_per_rank} threads each"


def effective(config: Config, placement: Placement) -> list[str]:
    """The config that DeepSpeed gets, as comments."""
    if not isinstance(config.engine, DeepSpeedConfig):
        return []
    from bigtrain.engine.deepspeed import ds_config  # imports torch: only here in the parent, and only when asked

    text = json.dumps(redact(ds_config(config, placement.world_size, placement.device)), indent=2)
    return ["", "# effective DeepSpeed config", *(f"# {line}" for line in text.splitlines())]
