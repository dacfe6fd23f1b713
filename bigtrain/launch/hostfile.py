"""launch=hostfile: the nodes that a file names, reached by ssh, their ranks started by the deepspeed launcher."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bigtrain import hardware
from bigtrain.config import Config, LaunchConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import write_atomic
from bigtrain.hardware import Placement
from bigtrain.launch import cluster, dryrun, local, nodes, survey
from bigtrain.launch.layout import Layout
from bigtrain.launch.nodes import Node
from bigtrain.launch.supervise import LAUNCH_ID

RANK = "bigtrain.launch.rank"
PROGRAMS = {"pdsh": "pdsh", "openmpi": "ompi_info", "mpich": "mpirun"}  # what the deepspeed launcher looks for
MPIRUN_SAYS = {"openmpi": "Open MPI", "mpich": "HYDRA"}  # of its version; both call their starter mpirun
_LINE = re.compile(r"(?P<host>[\w.-]+)\s+slots=(?P<slots>\d+)\s*(#.*)?")
# Variables that the deepspeed launcher would write into the command line of every node, with quotes that do not hold.
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "FI_", "LD_LIBRARY_PATH", "CUDA")
_PLAIN = re.compile(r"[\w@%+=:,./-]*")


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


def read(launch: LaunchConfig) -> list[Host]:
    """The hosts to use, in the file's order. Raises ConfigError, naming the line for one that is malformed."""
    path = launch.hostfile or ""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else "is not text"
        raise ConfigError("launch.hostfile", path, f"cannot be read ({reason})") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or match["host"].startswith("-"):
            shown = text if text.isprintable() else repr(text)
            raise ConfigError("launch.hostfile", path, f"line {number} is not `host slots=N`: {shown}", _way_out(text))
        if match["host"] in hosts:
            raise ConfigError("launch.hostfile", path, f"line {number} names {match['host']} again", "a line per host")
        if int(match["slots"]) < 1:
            raise ConfigError("launch.hostfile", path, f"line {number}: {match['host']} has no slots")
        hosts[match["host"]] = Host(match["host"], int(match["slots"]))
    if not hosts:
        raise ConfigError("launch.hostfile", path, "names no host", "a line per host: `host slots=N`")
    return _chosen(launch, list(hosts.values()))


def _way_out(line: str) -> str:
    if "@" in line:
        return "which user ssh takes says launch.ssh_config or ~/.ssh/config"
    if "max_slots" in line or "max-slots" in line:
        return "leave max_slots out: slots is how many ranks there may be"
    if "\0" in line:
        return "save the file as UTF-8"
    return "give the address a name in /etc/hosts or ssh's config" if line.count(":") > 1 else ""


def _chosen(launch: LaunchConfig, hosts: list[Host]) -> list[Host]:
    if launch.nodes is not None and launch.nodes > len(hosts):
        raise ConfigError("launch.nodes", launch.nodes, f"{launch.hostfile} lists {len(hosts)} hosts")
    if (launch.min_nodes or 1) > len(hosts):
        raise ConfigError("launch.min_nodes", launch.min_nodes, f"{launch.hostfile} lists {len(hosts)} hosts")
    hosts = hosts[: launch.nodes]
    for host in hosts:
        if launch.ranks is not None and launch.ranks > host.slots:
            raise ConfigError("launch.ranks", launch.ranks, f"{host.name} has {host.slots} slots in {launch.hostfile}")
    if launch.ranks is None and len({host.slots for host in hosts}) > 1:
        shown = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        raise ConfigError("launch.hostfile", launch.hostfile, f"the hosts differ in slots ({shown})",
                          "every node runs as many ranks as the others: name launch.ranks")  # fmt: skip
    return hosts


class HostfileBackend:
    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch
        self.listed = read(launch)

    def check(self) -> None:
        """Raises BigtrainError for what would go wrong inside somebody else's shell script."""
        program = PROGRAMS[self.launch.runner]
        if shutil.which(program) is None:
            package = {"openmpi": "openmpi-bin"}.get(self.launch.runner, self.launch.runner)
            raise ConfigError(
                "launch.runner", self.launch.runner, f"{program} is not installed here",
                f"install it (Debian: apt-get install {package})",
            )  # fmt: skip
        if self.launch.runner in MPIRUN_SAYS:
            done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
            said = (done.stdout + done.stderr).strip()
            if MPIRUN_SAYS[self.launch.runner] not in said:
                raise ConfigError(
                    "launch.runner", self.launch.runner, f"mpirun here is another's ({said.partition(chr(10))[0]})",
                    "put its own first in PATH (Debian: update-alternatives --config mpirun)",
                )  # fmt: skip
        if shutil.which("ssh") is None:
            raise BigtrainError("ssh is not installed here; install it (Debian: apt-get install openssh-client)")
        for name, value in (
            ("PYTHONPATH", os.environ.get("PYTHONPATH", "")), ("the path of Python", sys.executable),
            ("launch.ssh_config", self.launch.ssh_config or ""),
        ):  # fmt: skip
            if not _PLAIN.fullmatch(value):
                raise BigtrainError(f"{name} is {value!r}: blanks or quotes in it do not get through the launcher")

    def hosts(self) -> list[str]:
        return [host.name for host in self.listed]

    def ranks(self) -> int | None:
        return self.launch.ranks or self.listed[0].slots

    def opener(self, launch_id: str) -> Callable[[str, int], Node]:
        return nodes.over_ssh(self.launch, launch_id)

    def command(self, config: Config, layout: Layout) -> tuple[list[str], dict[str, str]]:
        """The real launcher. Of the user's values nothing is on its command line: the ranks find them in `files`."""
        folder = Path(config.run_dir) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "hostfile", "".join(f"{host} slots={layout.ranks}\n" for host in layout.hosts))
        exports = {LAUNCH_ID: layout.launch_id, "DS_ACCELERATOR": layout.device}
        write_atomic(folder / "deepspeed_env", "".join(f"{name}={value}\n" for name, value in exports.items()))
        return self.words(layout, folder), self.variables(folder)

    def words(self, layout: Layout, folder: Path) -> list[str]:
        options = {
            "pdsh": "-N",  # no host's name before each line
            "openmpi": "--bind-to none" + (" --allow-run-as-root" if os.geteuid() == 0 else ""),  # as ssh and pdsh do
            "mpich": "",
        }[self.launch.runner]
        # With mpich deepspeed runs a helper of its own, and --module would make python look for that as a module.
        started = [str(Path(__file__).with_name("rank.py"))] if self.launch.runner == "mpich" else ["--module", RANK]
        return [
            sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={folder}/hostfile", "--force_multi",
            f"--launcher={self.launch.runner}", f"--launcher_args={options}", "--no_ssh_check", "--no_local_rank",
            f"--master_addr={layout.master_address}", f"--master_port={layout.master_port}", "--log_level=critical",
            *started, "--files", layout.files,
        ]  # fmt: skip

    def variables(self, folder: Path) -> dict[str, str]:
        """Of the launcher itself. Nothing that it would export by name but PYTHONPATH, which is looked at before."""
        away = local.taken_away()
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in away and (name == "PYTHONPATH" or not name.startswith(_EXPORTED))
        }
        options = " ".join(nodes.ssh_options(self.launch))
        return kept | {
            "DS_ENV_FILE": str(folder / "deepspeed_env"),
            "DS_ACCELERATOR": "cpu",  # the launcher itself computes nothing: it must not look for GPUs here
            "PDSH_SSH_ARGS_APPEND": f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {options}".strip(),
            "OMPI_MCA_plm_rsh_args": options,
            "HYDRA_LAUNCHER_EXTRA_ARGS": options,  # MPICH's Hydra
        }


class Hostfile:
    """launch=hostfile."""

    def __init__(self, config: Config, say: Callable[[str], None], shown_only: bool) -> None:
        self.backend, self.say = HostfileBackend(config.launch), say
        if shown_only:
            self.placement = self.assumed(config.launch)
        else:
            self.backend.check()
            self.placement = survey.place(config, self.backend, say)

    def assumed(self, launch: LaunchConfig) -> Placement:
        """What the file and this machine let expect of the nodes; nobody is asked."""
        device: Literal["cpu", "cuda"] = "cuda" if launch.device != "cpu" and hardware.gpus() else "cpu"
        device = "cuda" if launch.device == "cuda" else device
        ranks = self.backend.ranks() or 1
        threads = launch.threads_per_rank or max(1, hardware.cores() // ranks)
        return Placement(device, ranks, threads, (), len(self.backend.listed))

    def run(self, config: Config) -> tuple[dict[str, Any], bool]:
        return local.run(config, self.placement, self.say, cluster.Launcher(self.backend, self.say))

    def show(self, config: Config) -> str:
        hosts = tuple(self.backend.hosts())
        layout = Layout(
            "0" * 32, hosts, self.placement.ranks, self.placement.device,
            config.launch.master_address or hosts[0], config.launch.master_port or 29500, (None,) * len(hosts),
        )  # fmt: skip
        words = self.backend.words(layout, Path(config.run_dir) / "logs")
        return dryrun.across(config, self.placement, layout, words)
