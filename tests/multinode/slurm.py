"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with files and ports of their own."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from pathlib import Path

NEEDED = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm", "munged": "munge"}


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, []
        folder.chmod(0o755)
        key, host = folder / "munge.key", socket.gethostname()
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = _free_ports(4)
        (folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=5
NodeName=node[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[2]}-{ports[3]}] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        )
        (folder / "state").mkdir()
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        path = os.environ["PATH"] + ":/usr/sbin"
        self.everything = os.environ | self.environment | {"PATH": path}
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        self._wait(lambda: (folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D", "-c")
        for node in ("node0", "node1"):
            (folder / f"spool-{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.call("sinfo", "-h", "-o", "%T %D") == "idle 2")

    def _daemon(self, *words: str) -> None:
        log = open(self.folder / f"{words[0]}.out", "ab")  # noqa: SIM115  of the daemon
        self.daemons.append(subprocess.Popen(words, env=self.everything, stdout=log, stderr=log))
        log.close()

    def _wait(self, ready: object) -> None:
        limit = time.monotonic() + 40
        while not ready():  # type: ignore[operator]
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))
            assert time.monotonic() < limit, logs
            time.sleep(0.1)

    def call(self, *words: str) -> str:
        return subprocess.run(words, env=self.everything, capture_output=True, text=True).stdout.strip()

    def close(self) -> None:
        self.call("scancel", "--full", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _free_ports(count: int) -> list[int]:
    """Of which the last two follow one another."""
    while True:
        sockets = [socket.socket() for _ in range(count - 1)]
        try:
            for each in sockets:
                each.bind(("", 0))
            ports = [each.getsockname()[1] for each in sockets]
            with socket.socket() as last:
                last.bind(("", ports[-1] + 1))
            return [*ports, ports[-1] + 1]
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
