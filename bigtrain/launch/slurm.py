"""launch=slurm: from a login node a batch job is written, submitted and followed to its end; inside an allocation the
ranks are started at once. Either way `srun` starts them, and agents (also by srun) watch them as on any cluster.

The job runs `python -m bigtrain.launch.slurm RUN_DIR`: the same supervisor that a hostfile has, on the first node.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from bigtrain import config as schema
from bigtrain import hardware
from bigtrain.config import Config, LaunchConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import write_atomic
from bigtrain.hardware import Placement
from bigtrain.launch import cluster, dryrun, environment, local, nodes, survey
from bigtrain.launch.layout import Layout
from bigtrain.launch.nodes import Node
from bigtrain.launch.run_dir import read_result, readable_errors
from bigtrain.launch.supervise import LAUNCH_ID, Ending, counting_signals
from bigtrain.plan import preflight
from bigtrain.redact import redact
from bigtrain.terminal import settle

MODULE, RANK = "bigtrain.launch.slurm", "bigtrain.launch.rank"
SUBMITTED, OUTCOME = ".submitted.json", "slurm-outcome.json"  # in the run directory
_OPTION = re.compile(r"--?[\w-]+(=[\w@%+=:,./\[\]-]*)?")
_VALUE = re.compile(r"[\w@%+=:,./&|*-]+")
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL",
         "DEADLINE")  # fmt: skip


def inside() -> bool:
    return "SLURM_JOB_ID" in os.environ and "SLURM_JOB_NODELIST" in os.environ


class SlurmBackend:
    """Inside an allocation."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch
        names = _slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        if launch.nodes is not None and launch.nodes > len(names):
            raise ConfigError("launch.nodes", launch.nodes, f"the allocation has {len(names)} nodes")
        self.names = names[: launch.nodes]

    def hosts(self) -> list[str]:
        return self.names

    def ranks(self) -> int | None:
        return self.launch.ranks

    def opener(self, launch_id: str) -> Callable[[str, int], Node]:
        def open_node(host: str, number: int) -> Node:
            one = ["--nodes=1", "--ntasks=1", f"--nodelist={host}", "--job-name=agent"]
            return Node(host, number, [*_srun(), *one, *nodes.agent_command(launch_id)], _clean())

        return open_node

    def command(self, config: Config, layout: Layout) -> tuple[list[str], dict[str, str]]:
        return srun_words(layout), _clean()


def _srun() -> list[str]:
    """Lines come through as they are written; --unbuffered would give each task a terminal of no width instead."""
    return ["srun", "--overlap", "--cpu-bind=none", "--mpi=none", "--export=ALL"]


def srun_words(layout: Layout) -> list[str]:
    count = len(layout.hosts)
    return [
        *_srun(), f"--nodes={count}", f"--ntasks={count * layout.ranks}", f"--ntasks-per-node={layout.ranks}",
        f"--nodelist={','.join(layout.hosts)}", "--distribution=block", "--kill-on-bad-exit=1", "--job-name=ranks",
        "env", f"{LAUNCH_ID}={layout.launch_id}", sys.executable, "-m", RANK, "--files", layout.files,
    ]  # fmt: skip


def _clean() -> dict[str, str]:
    """The environment of srun: what sbatch or salloc asked for the job must not be asked of each step again."""
    names = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK",
             "SLURM_DISTRIBUTION", "SLURM_STEP_ID", *local.taken_away())  # fmt: skip
    return {name: value for name, value in os.environ.items() if name not in names}


def _slurm(*words: str) -> str:
    """The output of one of Slurm's commands. Raises BigtrainError with what it says."""
    if shutil.which(words[0]) is None:
        raise ConfigError("launch", "slurm", f"{words[0]} is not installed here", "start it on a login node of Slurm")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise BigtrainError(f"{words[0]}: no answer from Slurm within 60 s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise BigtrainError(f"{words[0]}: {lines[-1]}")
    return done.stdout


# --------------------------------------------------------------------------------------------------- the job


def script(config: Config, placement: Placement) -> str:
    """The batch job. Of a user's values only checked ones stand in it, and paths as quoted words."""
    slurm = config.launch.slurm
    options = [f"--nodes={placement.nodes}", f"--ntasks-per-node={placement.ranks}",
               f"--cpus-per-task={placement.threads_per_rank}"]  # fmt: skip
    if placement.device == "cuda":
        options.append(f"--gpus-per-node={placement.ranks}")
    for name in ("partition", "account", "qos", "constraint", "time"):
        if (value := getattr(slurm, name)) is not None:
            if not _VALUE.fullmatch(value):
                raise ConfigError(f"launch.slurm.{name}", value, "not what sbatch takes there")
            options.append(f"--{name}={value}")
    for option in slurm.options:
        if not _OPTION.fullmatch(option):
            raise ConfigError("launch.slurm.options", option, "not an option of sbatch", "write each as --name=value")
        options.append(option)
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options)]
    if (config.launch.min_nodes or placement.nodes) < placement.nodes:
        lines.append("#SBATCH --no-kill")  # when a node fails the others go on
    lines += [
        "",
        "# The supervisor, on the first node: it starts the ranks with srun, watches them, starts them again.",
    ]
    lines.append(f"exec {shlex.join([sys.executable, '-m', MODULE, config.run_dir])}")
    return "\n".join(lines) + "\n"


class Slurm:
    def __init__(self, config: Config, say: Callable[[str], None], shown_only: bool) -> None:
        self.say = say
        self.backend = SlurmBackend(config.launch) if inside() and not shown_only else None
        if self.backend is not None:
            self.placement = survey.place(config, self.backend, say)
        else:
            self.placement = assumed(config.launch)
            script(config, self.placement)  # its values are checked now
            if not shown_only:
                _slurm("sbatch", "--version")

    def show(self, config: Config) -> str:
        hosts = tuple(f"node{number}" for number in range(self.placement.nodes))
        layout = Layout("0" * 32, hosts, self.placement.ranks, self.placement.device, hosts[0],
                        config.launch.master_port or 29500, (None,) * len(hosts))  # fmt: skip
        text = "".join(f"# {line}\n" for line in script(config, self.placement).splitlines())
        return text + "\n" + dryrun.across(config, self.placement, layout, srun_words(layout))

    def run(self, config: Config) -> tuple[dict[str, Any], bool]:
        if self.backend is not None:
            return local.run(config, self.placement, self.say, cluster.Launcher(self.backend, self.say))
        return self._submit(config)

    def _submit(self, config: Config) -> tuple[dict[str, Any], bool]:
        run_dir = Path(config.run_dir)
        with readable_errors(run_dir):
            (run_dir / "logs").mkdir(exist_ok=True)
            (run_dir / OUTCOME).unlink(missing_ok=True)
            write_atomic(run_dir / "slurm.sbatch", script(config, self.placement))
            submitted = {"config": schema.to_dict(config), "environment": environment.forwarded(config)}
            path = run_dir / SUBMITTED
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump(submitted, file)
        log = run_dir / "logs" / "slurm.log"
        log.unlink(missing_ok=True)
        name = re.sub(r"[^\w.-]", "-", run_dir.name)
        job = _slurm(
            "sbatch", "--parsable", f"--job-name={name}",
            f"--output={log}", f"--chdir={os.getcwd()}", "--open-mode=append", str(run_dir / "slurm.sbatch"),
        ).strip().split(";")[0]  # fmt: skip
        self.say(f"Slurm job {job} is submitted: {self.placement.nodes} nodes x {self.placement.ranks} ranks")
        try:
            return self._follow(config, job, log)
        finally:
            path.unlink(missing_ok=True)

    def _follow(self, config: Config, job: str, log: Path) -> tuple[dict[str, Any], bool]:
        """Until the job is over: its words here, a signal from here to it."""
        run_dir, ending, passed_on, offset, state = Path(config.run_dir), Ending(), 0, 0, ""
        with counting_signals(ending):
            while state.split()[0:1] not in [[name] for name in _OVER]:
                with contextlib.suppress(BigtrainError):
                    state = _state(job)
                if ending.signals > passed_on:
                    passed_on = ending.signals
                    words = ["scancel", "--batch", "--signal=TERM", job] if state.startswith("RUNNING") else []
                    with contextlib.suppress(BigtrainError):
                        _slurm(*(words if words and passed_on == 1 else ["scancel", job]))
                offset = _pass_on(log, offset)
                time.sleep(config.launch.slurm.poll_seconds)
            _pass_on(log, offset)
        try:
            outcome = json.loads((run_dir / OUTCOME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if ending.signals:
                raise KeyboardInterrupt from None
            raise BigtrainError(f"Slurm ended job {job}: {state}; its last lines are in {log}") from None
        if outcome["interrupted"]:
            raise KeyboardInterrupt
        if outcome["error"]:
            raise BigtrainError(outcome["error"])
        return read_result(run_dir) or {}, bool(outcome["asked"])


def assumed(launch: LaunchConfig) -> Placement:
    """What the config lets expect of nodes that nobody can ask yet: they are taken to be like this machine."""
    device: Literal["cpu", "cuda"] = "cpu"
    if launch.device == "cuda" or (launch.device == "auto" and hardware.gpus() and not hardware.torch_is_cpu_build()):
        device = "cuda"
    here = len(hardware.gpus()) if device == "cuda" else min(2, hardware.cores())
    ranks = launch.ranks or here
    if not ranks:
        raise ConfigError("launch.ranks", None, "how many GPUs a node has is not known here", "name launch.ranks")
    threads = launch.threads_per_rank or max(1, hardware.cores() // ranks)
    return Placement(device, ranks, threads, (), launch.nodes or 1)


def _state(job: str) -> str:
    """The job's state and, if it did not end well, why. Needs no accounting database."""
    found = dict(re.findall(r"(\w+)=(\S*)", _slurm("scontrol", "show", "job", job)))
    state = found.get("JobState", "UNKNOWN")
    return state if state in ("PENDING", "RUNNING") else f"{state} (reason {found.get('Reason')})"


def _pass_on(log: Path, offset: int) -> int:
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(offset)
        text = file.read()
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        return offset + len(text)
    return offset


def main() -> None:
    """The batch job: the supervisor on the first node. What it ends with goes into slurm-outcome.json."""
    settle(goes_on=True)
    run_dir = Path(sys.argv[1])
    submitted = json.loads((run_dir / SUBMITTED).read_text(encoding="utf-8"))
    os.environ.update(submitted["environment"])
    config = schema.from_dict(submitted["config"])
    outcome: dict[str, Any] = {"error": None, "interrupted": False, "asked": False}

    def say(line: str) -> None:
        print(redact(line), flush=True)

    try:
        backend = SlurmBackend(config.launch)
        placement = survey.place(config, backend, say)
        preflight.check(config, placement)
        preflight.write(config, run_dir, placement)
        _, outcome["asked"] = local.run(config, placement, say, cluster.Launcher(backend, say))
    except KeyboardInterrupt:
        outcome["interrupted"] = True
    except Exception as error:
        known = isinstance(error, BigtrainError)
        outcome["error"] = redact(str(error) if known else f"{type(error).__name__}: {error}")
    write_atomic(run_dir / OUTCOME, json.dumps(outcome))
    sys.exit(1 if outcome["error"] or outcome["interrupted"] else 0)


if __name__ == "__main__":
    main()
