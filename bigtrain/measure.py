"""Measure this machine into a cluster file: `bigtrain doctor --cluster-file FILE`.

As many processes as `train` would start run the same kernels at the same time, for they share caches, memory and clock:
what one alone reaches is not what a rank gets. Every figure is the median of several tries: the best is what a kernel
does between two moments of the others, and a step is the sum of many. The whole takes half a minute.

    python -m bigtrain.measure RANK RANKS THREADS PORT DEVICE SECONDS    is one of those processes
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from bigtrain import foreign, hardware
from bigtrain.config import LaunchConfig
from bigtrain.errors import BigtrainError
from bigtrain.launch import ops
from bigtrain.launch.local import KEEP_FREED_MEMORY
from bigtrain.plan import clusters, fixed_costs
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.efficiency import measured_widths

TIMEOUT_SECONDS = 180
DISK_MIB = 256
MESSAGE_MIB = 32
LAYERS = 6  # that a kernel is run for one after another


def write_cluster_file(path: Path, budget_seconds: float = 0.8) -> Cluster:
    """Measure, each kernel for so long, and write what `cluster=PATH` reads.

    Raises BigtrainError where a measurement or the file fails.
    """
    if not path.parent.is_dir():
        raise BigtrainError(f"{path.parent}: no such directory")
    cluster = measured(path.parent, budget_seconds)
    data = asdict(cluster)
    del data["name"]
    today = f"# Measured by bigtrain doctor on {date.today():%Y-%m-%d}; watts and price are not: put yours.\n"
    try:
        path.write_text(today + yaml.safe_dump(_rounded(data), sort_keys=False, width=120), encoding="utf-8")
    except OSError as error:
        raise BigtrainError(f"{path}: cannot be written ({error.strerror})") from None
    return clusters.read(path)


def measured(folder: Path, budget_seconds: float = 0.8) -> Cluster:
    """This machine as `train` would use it; the disk is that of `folder`."""
    placement = hardware.place(LaunchConfig())
    cluster = clusters.here(LaunchConfig())
    found = _ranks(max(2, placement.ranks), placement.threads_per_rank, placement.device, budget_seconds)
    source = {name: text for name, text in cluster.source.items() if name in ("kg_co2_per_kwh", "pue")}
    by_hand = ("device.watts", "price_per_device_hour", "inter_node_gb_per_second", "inter_node_latency_us")
    source |= {name: "not measured: taken from the preset" for name in by_hand}
    unmeasured = {} if cluster.device.is_cpu else cluster.device.peak_tflops  # fp8 of a GPU that has it
    device = replace(
        cluster.device,
        peak_tflops=unmeasured | found["peak_tflops"],
        memory_gb_per_second=found["memory_gb_per_second"],
        efficiency=found["efficiency"],
    )
    link = cluster.host_link_gb_per_second if placement.gpus else found["memory_gb_per_second"]
    names = ("peak_tflops", "memory_gb_per_second", "efficiency")
    source |= {f"device.{name}": "measured on this machine" for name in names}
    names = ("intra_node_gb_per_second", "intra_node_latency_us", "disk_gb_per_second")
    source |= {name: "measured on this machine" for name in names}
    return replace(
        cluster,
        device=device,
        intra_node_gb_per_second=found["link_gb_per_second"],
        intra_node_latency_us=found["latency_us"],
        host_link_gb_per_second=link,
        disk_gb_per_second=_disk(folder),
        disk_gib=_free(folder),
        source=source,
    )


def described(cluster: Cluster) -> str:
    """The figures that one asks for first."""
    device = cluster.device
    peaks = ", ".join(f"{name} {tflops:.3g} TFLOP/s" for name, tflops in device.peak_tflops.items())
    return (
        f"{cluster.devices_per_node} ranks, each: {peaks}, memory {device.memory_gb_per_second:.3g} GB/s, "
        f"between ranks {cluster.intra_node_gb_per_second:.3g} GB/s, disk {cluster.disk_gb_per_second:.3g} GB/s"
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _ranks(ranks: int, threads: int, device: str, budget_seconds: float) -> dict[str, Any]:
    """Run the processes; the first one's figures."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = foreign.without(os.environ) | {
        "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TORCH_EXTENSIONS_DIR": str(ops.extensions_dir()), "PATH": ops.search_path(),
    }  # fmt: skip
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "GLIBC_TUNABLES": KEEP_FREED_MEMORY}
    told = [str(ranks), str(threads), str(port), device, str(budget_seconds)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bigtrain.measure", str(rank), *told],
            env=environment | {"LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        raise BigtrainError(f"measuring took more than {TIMEOUT_SECONDS} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            last = (errors.strip().splitlines() or ["no output"])[-1]
            raise BigtrainError(f"measuring failed: {last}")
    found: dict[str, Any] = json.loads(outputs[0][0].strip().splitlines()[-1])
    return found


def _disk(folder: Path) -> float:
    """GB/s of writing a file to the disk, not to the page cache."""
    block = os.urandom(8 * 2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(DISK_MIB // 8):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return DISK_MIB * 2**20 / (time.perf_counter() - started) / 1e9
    except OSError as error:
        raise BigtrainError(f"{folder}: {error.strerror or error}") from None


def _free(folder: Path) -> float:
    import shutil

    return shutil.disk_usage(folder).free / 2**30


# ------------------------------------------------------------------------------------------- one process


def _main(rank: int, ranks: int, threads: int, port: int, device_name: str, budget: float) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from bigtrain.models import cpu_bf16

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    backend = "nccl" if device_name == "cuda" and torch.cuda.device_count() >= ranks else "gloo"
    device = torch.device(f"cuda:{rank}" if backend == "nccl" else device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        cpu_bf16.enable()  # as a rank does
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(run: Callable[[], object], tries: int | None = None) -> float:
        """The median of all the tries that there is time for, beside the other ranks' tries; of `tries` for what ranks
        do together, which all of them must do equally often."""
        run()
        wait()
        dist.barrier()
        taken: list[float] = []
        end = time.perf_counter() + budget
        while len(taken) < (tries or 3) or (tries is None and time.perf_counter() < end):
            started = time.perf_counter()
            run()
            wait()
            taken.append(time.perf_counter() - started)
        dist.barrier()
        return statistics.median(taken)

    kernels = _Kernels(torch, device, seconds)
    peaks = {"fp32": kernels.peak(torch.float32), "bf16": kernels.peak(torch.bfloat16)}
    if device.type == "cuda" or hardware.cpu_has_fp16():
        peaks["fp16"] = kernels.peak(torch.float16)
    bandwidth = kernels.bandwidth()
    efficiency = kernels.efficiency(peaks, bandwidth)
    size = MESSAGE_MIB * 2**20
    message = torch.zeros(size // 4, device=device)
    all_reduce = seconds(lambda: dist.all_reduce(message), tries=6)
    small = torch.zeros(2, device=device)
    latency = seconds(lambda: dist.all_reduce(small), tries=50)
    passes = 2 * (ranks - 1) / ranks
    link = passes * size / max(all_reduce - latency, 1e-9) / 1e9
    if backend == "nccl" or device.type == "cpu":  # gloo gathers and scatters nothing that is on a GPU
        efficiency |= _collectives(torch, message, seconds, link) | fixed_costs.measured(device)
    result = {
        "peak_tflops": peaks,
        "memory_gb_per_second": bandwidth,
        "efficiency": efficiency,
        "link_gb_per_second": link,
        "latency_us": latency / (2 * (ranks - 1)) * 1e6,
    }
    dist.barrier()
    return result


def _collectives(torch: Any, message: Any, seconds: Callable[..., float], link: float) -> dict[str, float]:
    """Of the two that a sharded step is made of, its speed as a fraction of an all-reduce's: gloo's are slower."""
    dist = torch.distributed
    ranks = dist.get_world_size()
    part = torch.empty(len(message) // ranks, device=message.device)
    sent = message.numel() * message.element_size() * (ranks - 1) / ranks
    runs = {
        "all_gather": lambda: dist.all_gather_into_tensor(message[: ranks * len(part)], part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, message[: ranks * len(part)]),
    }
    return {name: sent / seconds(run, tries=6) / 1e9 / link for name, run in runs.items()}


class _Kernels:
    """The kernels of a training step, each beside what the data sheet (here: the peaks just measured) allows."""

    def __init__(self, torch: Any, device: Any, seconds: Callable[..., float]) -> None:
        self.torch, self.device, self.seconds = torch, device, seconds

    def peak(self, dtype: Any) -> float:
        """TFLOP/s of the matrix product that runs fastest."""
        best = 0.0
        for size in (8192,) if self.device.type == "cuda" else (1024, 2048):
            a = self.torch.randn(size, size, device=self.device).to(dtype)
            best = max(best, 2 * size**3 / self.seconds(lambda a=a: a @ a) / 1e12)
        return best

    def bandwidth(self) -> float:
        """GB/s of copying what no cache holds, read and written."""
        size = 2**30 if self.device.type == "cuda" else 2**27
        a, b = (self.torch.zeros(size // 4, device=self.device) for _ in range(2))
        return 2 * size / self.seconds(lambda: b.copy_(a)) / 1e9

    def efficiency(self, peaks: dict[str, float], bandwidth: float) -> dict[str, float]:
        """What plan/efficiency.py names, as fractions; NAME_fp32 where another precision differs."""
        torch = self.torch
        found: dict[str, float] = {}
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            suffix = "" if name == "bf16" else f"_{name}"
            widths = measured_widths(self.device.type != "cuda")
            for kernel, dim in zip(("matmul_narrow", "matmul"), widths, strict=True):
                found[f"{kernel}{suffix}"] = self._matmul(dim, dtype) / (peaks[name] * 1e12)
            found[f"attention{suffix}"] = self._attention(dtype) / (peaks[name] * 1e12)
            found[f"memory{suffix}"] = self._elementwise(dtype) / (bandwidth * 1e9)
        found["optimizer"] = self._optimizer() / (bandwidth * 1e9)
        return found

    def _trained(self, functions: list[Callable[[Any], Any]], x: Any) -> float:
        """Seconds of a forward pass of each function, and then their backward passes, as of the layers of a model: what
        one leaves behind is in no cache when it is needed again."""
        inputs = [x.detach().clone().requires_grad_() for _ in functions]

        def run() -> None:
            for one in inputs:
                one.grad = None
            outputs = [function(one) for function, one in zip(functions, inputs, strict=True)]
            self.torch.autograd.backward(outputs, [self.torch.ones_like(y) for y in outputs])

        return self.seconds(run)

    def _matmul(self, dim: int, dtype: Any) -> float:
        """FLOP/s of a feed-forward layer's two matmuls, forward and backward."""
        torch = self.torch
        rows = 8192 if self.device.type == "cuda" else 1024

        def layer() -> Any:
            pair = torch.nn.Linear(dim, 4 * dim, bias=False), torch.nn.Linear(4 * dim, dim, bias=False)
            return torch.nn.Sequential(*pair).to(self.device, dtype)

        x = torch.randn(rows, dim, device=self.device, dtype=dtype)
        return LAYERS * 3 * 2 * 2 * rows * 4 * dim**2 / self._trained([layer() for _ in range(LAYERS)], x)

    def _attention(self, dtype: Any) -> float:
        """FLOP/s of causal attention as models/layers.py runs it, its two projections taken off."""
        from bigtrain.models import cpu_kernels

        torch = self.torch
        sequences, heads, length, head_dim = (8, 16, 2048, 128) if self.device.type == "cuda" else (2, 8, 256, 64)

        def attend(qkv: Any) -> Any:
            q, k, v = qkv.unbind(0)
            if cpu_kernels.attention_usable(q):
                return cpu_kernels.causal_attention(q, k, v)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        x = torch.randn(3, sequences, heads, length, head_dim, device=self.device, dtype=dtype)
        work = 4.0 * sequences * heads * length * (length + 1) / 2 * head_dim
        return LAYERS * 3.5 * work / self._trained([attend] * LAYERS, x)

    def _elementwise(self, dtype: Any) -> float:
        """Bytes per second of a norm, an activation and a residual, forward and backward."""
        from bigtrain.models import cpu_kernels

        torch = self.torch
        rows, dim = (16384, 4096) if self.device.type == "cuda" else (1024, 2048)
        norm = torch.nn.LayerNorm(dim, device=self.device, dtype=dtype)

        def pass_through(x: Any) -> Any:
            y = norm(x)
            y = cpu_kernels.gelu_tanh(y) if cpu_kernels.usable(y) else torch.nn.functional.gelu(y, approximate="tanh")
            return x + y

        x = torch.randn(rows, dim, device=self.device, dtype=dtype)
        moved = LAYERS * 3 * (2 + 2 + 3) * x.numel() * x.element_size()
        return moved / self._trained([pass_through] * LAYERS, x)

    def _optimizer(self) -> float:
        """Bytes per second of AdamW with clipping, 28 bytes a parameter."""
        torch = self.torch
        count = 2**28 if self.device.type == "cuda" else 2**24  # more than a cache holds
        parameters = [torch.nn.Parameter(torch.zeros(count // 4, device=self.device)) for _ in range(4)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def run() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return 28 * count / self.seconds(run)


if __name__ == "__main__":
    RANK, RANKS, THREADS, PORT = map(int, sys.argv[1:5])
    print(json.dumps(_main(RANK, RANKS, THREADS, PORT, sys.argv[5], float(sys.argv[6]))), flush=True)
    os._exit(0)  # as the ranks of a run end: threads of gloo may outlive their group, and abort
