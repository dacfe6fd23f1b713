"""The peak that model FLOPs utilisation is measured against."""

from __future__ import annotations

import time

import torch

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's and AMD's data sheets; fp32 without TF32 is a fraction of it.
_BF16_PEAKS = {
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
    "V100": 125e12,
    "MI300X": 1307.4e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one rank: of a known GPU in 16 bits by its data sheet, of anything else by measuring a large matmul."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, peak in _BF16_PEAKS.items():
            if known in name:
                return peak
    return _measured_peak(device, dtype)


def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
