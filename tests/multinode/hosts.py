"""Hosts for tests: each with a network, processes and a name of its own (Linux namespaces), and a real sshd.

    hub (where the command runs) --- bridge --- h1, h2, ...

A host can be killed with everything on it, its link can be cut, and a folder of it can be its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.runs import command, metrics

NEEDED = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
SUBNET = "10.177.0"


def missing(programs: dict[str, str] = NEEDED) -> str | None:
    """Why there can be no hosts here."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
    for program, package in programs.items():
        if shutil.which(program, path=path) is None:
            return f"{program} is missing: apt-get install {package}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--uts", "true"], capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


class Host:
    def __init__(self, name: str, hub: str, number: int, folder: Path, private: Path | None) -> None:
        self.name, self.space, self.address = name, f"{hub}-{name}", f"{SUBNET}.{number + 10}"
        self.number, self.hub, self.folder, self.private = number, hub, folder, private
        self.process: subprocess.Popen[bytes] | None = None
        _run("ip", "netns", "add", self.space)
        _run("ip", "-n", hub, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", self.space)
        _run("ip", "-n", hub, "link", "set", f"v{number}", "master", "br0", "up")
        _run("ip", "-n", self.space, "address", "add", f"{self.address}/24", "dev", "eth0")
        _run("ip", "-n", self.space, "link", "set", "eth0", "up")
        _run("ip", "-n", self.space, "link", "set", "lo", "up")
        self.boot()

    def boot(self) -> None:
        own = f"mount -t tmpfs tmpfs {self.private} && " if self.private else ""
        with open(self.folder / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.space,
                 "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts",
                 "sh", "-c", f"hostname {self.name} && {own}exec /usr/sbin/sshd -D -e -f {self.folder}/sshd_config"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """All that runs on this host, as seen from outside: sshd, agents, launchers, ranks."""
        found = []
        mine = f"/var/run/netns/{self.space}"
        with contextlib.suppress(OSError):
            inode = os.stat(mine).st_ino
            for process in psutil.process_iter():
                with contextlib.suppress(OSError, psutil.Error):
                    alive = process.status() != psutil.STATUS_ZOMBIE
                    if alive and os.stat(f"/proc/{process.pid}/ns/net").st_ino == inode:
                        found.append(process)
        return found

    def running(self, *words: str) -> list[psutil.Process]:
        """Those whose command line has all of `words`."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if all(word in process.cmdline() for word in words):
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Not the launcher, whose arguments name the module too."""
        return [process for process in self.running("bigtrain.worker") if process.cmdline()[3] == "bigtrain.worker"]

    def leftovers(self) -> list[list[str]]:
        """Python processes: of a run that is over there must be none."""
        left = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if words and "python" in words[0]:
                    left.append(words)
        return left

    def kill(self) -> None:
        """Pull the plug: everything on it is gone at once, and so is its network."""
        assert self.process is not None
        self.link_down()
        self.process.kill()  # unshare: its child is the namespace's first process, and the kernel ends the others
        self.process.wait()

    def boot_again(self) -> None:
        self.link_up()
        self.boot()

    def cut(self) -> None:
        """Unplug it from the switch: nothing gets in or out, and nobody is told (no link goes down)."""
        _run("ip", "-n", self.hub, "link", "set", f"v{self.number}", "nomaster")

    def link_down(self) -> None:
        _run("ip", "-n", self.space, "link", "set", "eth0", "down")

    def link_up(self) -> None:
        _run("ip", "-n", self.space, "link", "set", "eth0", "up")

    @contextlib.contextmanager
    def slowed(self, megabits_per_second: int) -> Iterator[None]:
        """All that it sends goes no faster (tc: a token bucket)."""
        shape = ["tbf", "rate", f"{megabits_per_second}mbit", "burst", "64kb", "latency", "400ms"]
        _run("tc", "-n", self.space, "qdisc", "add", "dev", "eth0", "root", *shape)
        try:
            yield
        finally:
            _run("tc", "-n", self.space, "qdisc", "del", "dev", "eth0", "root")

    @contextlib.contextmanager
    def sees(self, instead: Path, of: Path) -> Iterator[None]:
        """On this host alone, `instead` lies where `of` is."""
        sshd = next(process for process in self.processes() if process.name() == "sshd")
        inside = ["nsenter", f"--target={sshd.pid}", "--mount", "--pid"]
        _run(*inside, "mount", "--bind", str(instead), str(of))
        try:
            yield
        finally:
            _run(*inside, "umount", "--lazy", str(of))

    def heal(self) -> None:
        _run("ip", "-n", self.hub, "link", "set", f"v{self.number}", "master", "br0")


class Cluster:
    """`hosts` hosts and a hub that reaches them; `private`: a folder that on the last one is its own."""

    def __init__(self, folder: Path, hosts: int, private: Path | None = None) -> None:
        self.folder, self.hub = folder, f"bt{os.getpid()}"
        self.hosts: list[Host] = []
        self.started: list[subprocess.Popen[str]] = []
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("host_key", "user_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
            "PidFile none\nPermitRootLogin yes\nMaxStartups 100\nPrintMotd no\nPrintLastLog no\n"
            "PermitUserEnvironment yes\n"
        )
        _run("ip", "netns", "add", self.hub)
        _run("ip", "-n", self.hub, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self.hub, "address", "add", f"{SUBNET}.1/24", "dev", "br0")
        _run("ip", "-n", self.hub, "link", "set", "br0", "up")
        _run("ip", "-n", self.hub, "link", "set", "lo", "up")
        for number in range(hosts):
            own = private if number == hosts - 1 else None
            self.hosts.append(Host(f"h{number + 1}", self.hub, number, folder, own))
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user_key\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\nLogLevel ERROR\n"
            "User root\n" + "".join(f"Host {host.name}\n  HostName {host.address}\n" for host in self.hosts)
        )
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{host.name} slots=1\n" for host in self.hosts))
        for host in self.hosts:
            self.wait_for_ssh(host)

    def wait_for_ssh(self, host: Host) -> None:
        limit = time.monotonic() + 20
        words = self.inside("ssh", "-F", str(self.folder / "ssh_config"), "-o", "ConnectTimeout=2", host.name, "true")
        while (done := subprocess.run(words, capture_output=True, text=True)).returncode:
            log = (self.folder / f"{host.name}.log").read_text()
            assert time.monotonic() < limit, f"no ssh to {host.name}: {done.stderr} {log}"
            time.sleep(0.1)

    def inside(self, *words: str) -> list[str]:
        """The command that runs `words` on the hub."""
        return ["ip", "netns", "exec", self.hub, *words]

    def train(self, *overrides: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self.inside(*command("train", "launch=hostfile", f"launch.hostfile={self.hostfile}",
                                 f"launch.ssh_config={self.folder}/ssh_config", *overrides)),
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))} | environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.started.append(process)
        return process

    def wait_for_steps(self, process: subprocess.Popen[str], run: Path, count: int) -> None:
        limit = time.monotonic() + 120
        while len(metrics(run) if (run / "metrics.jsonl").exists() else []) < count:
            if process.poll() is not None:
                raise AssertionError("".join(process.communicate()))
            assert time.monotonic() < limit, "waited in vain"
            time.sleep(0.05)

    def leftovers(self) -> list[list[str]]:
        return [words for host in self.hosts for words in host.leftovers()]

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for host in self.hosts:
            assert host.process is not None
            host.process.kill()
            host.process.wait()
            for process in host.processes():
                process.kill()
            subprocess.run(["ip", "netns", "del", host.space], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.hub], capture_output=True)
