"""launch=manual, launch=torchrun, launch=kubernetes: somebody else starts the ranks.

The run is checked and prepared here, its resolved config lies in the run directory, and what is to be started on each
node is printed: nothing is started and nothing is watched from here. The ranks find out who they are from what starts
them (rank.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtrain.config import Config, dump, held_back
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import write_atomic
from bigtrain.launch import dryrun, kubernetes, local
from bigtrain.launch.run_dir import readable_errors
from bigtrain.launch.slurm import assumed
from bigtrain.redact import redact

RANK = "bigtrain.launch.rank"
PORT = 29500  # torch's own; there is nobody whom one could ask for a free one


class Manual:
    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.say, launch = say, config.launch
        self.placement = assumed(launch)
        self.kind = launch.kind
        self.port = launch.master_port or PORT
        self.address = launch.master_address or local.ADDRESS
        if self.kind == "kubernetes":
            kubernetes.check(config)
            self.address = kubernetes.first_pod(config)
        elif self.placement.nodes > 1 and launch.master_address is None:
            raise ConfigError(
                "launch.master_address", None, f"launch={self.kind} cannot know the first node",
                "name its address as the other nodes reach it",
            )  # fmt: skip
        if held_back(config):
            raise BigtrainError(
                f"launch={self.kind}: the config holds a secret, and there is no safe way from here to the ranks;"
                " set it as a variable where they are started"
            )

    def show(self, config: Config) -> str:
        return "\n".join([dryrun.heading(self.placement), self.text(config), *dryrun.effective(config, self.placement)])

    def run(self, config: Config) -> tuple[dict[str, Any], bool] | None:
        """Write the config and say what is to be started. None: there is no result to wait for."""
        run_dir = Path(config.run_dir)
        with readable_errors(run_dir):
            text = dump(config)
            write_atomic(run_dir / "config.yaml", text)
            write_atomic(run_dir / "config.sha256", f"{hashlib.sha256(text.encode()).hexdigest()}\n")
            if self.kind == "kubernetes":
                write_atomic(run_dir / "kubernetes.yaml", self.text(config))
                self.say(f"start it with: kubectl apply -f {shlex.quote(str(run_dir / 'kubernetes.yaml'))}")
                return None
        self.say(self.text(config))
        return None

    def text(self, config: Config) -> str:
        """A command for each node, or the manifest."""
        if self.kind == "kubernetes":
            words = self.words(config, "$(NODE_RANK)")
            return kubernetes.manifest(config, self.placement, words, self.environment(config))
        lines = []
        for number in range(self.placement.nodes):
            words = ["env", *(f"{name}={value}" for name, value in self.environment(config).items())]
            lines += [f"# on node {number}", shlex.join([*words, *self.words(config, str(number))])]
        return "\n".join(lines)

    def environment(self, config: Config) -> dict[str, str]:
        own = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if self.placement.device == "cpu":
            own = {"GLIBC_TUNABLES": local.heap_settings(config)}
        variables = {
            "DS_ACCELERATOR": self.placement.device, "OMP_NUM_THREADS": str(self.placement.threads_per_rank),
            "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        clean: dict[str, str] = redact(variables | own | config.launch.env)
        return clean

    def words(self, config: Config, node: str) -> list[str]:
        """What one node runs: it starts its ranks and ends when they do."""
        nodes, ranks = self.placement.nodes, self.placement.ranks
        sha256 = hashlib.sha256(dump(config).encode()).hexdigest()
        worker = [RANK, str(Path(config.run_dir) / "config.yaml"), "--sha256", sha256]
        if self.kind == "torchrun":
            return [
                sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}",
                f"--node-rank={node}", f"--master-addr={self.address}", f"--master-port={self.port}", "-m", *worker,
            ]  # fmt: skip
        world = {f"node{number}": list(range(ranks)) for number in range(nodes)}
        encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
        return [
            sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", f"--node_rank={node}",
            f"--master_addr={self.address}", f"--master_port={self.port}", "--no_local_rank", "--log_level=critical",
            "--module", *worker,
        ]  # fmt: skip
