"""What is wrong with this machine's GPUs, as its driver tells: memory errors, slow clocks, faults in the kernel's log.

`nvidia-smi -q -x` is read by the names of its elements, of which drivers since 450 have more or fewer; Xid messages are
what the driver writes into the kernel's log (docs.nvidia.com/deploy/xid-errors). Neither needs a GPU to be read back.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from xml.etree import ElementTree

from bigtrain import hardware

SECONDS = 15  # for a driver that hangs because a GPU has
_SLOWED = {
    "hw_thermal_slowdown": "too hot", "sw_thermal_slowdown": "too hot", "hw_power_brake_slowdown": "short of power",
    "hw_slowdown": "by the hardware: heat or power",
}  # fmt: skip
_XID = re.compile(r"NVRM: Xid \(PCI:(?P<bus>[0-9a-fA-F:]+)[^)]*\): (?P<number>\d+), *(?P<text>.*)")
# Of a program, not of the GPU: a bug in a kernel, a process that was ended (the table of NVIDIA's document).
_OF_PROGRAMS = {13, 31, 43, 45, 68}


def problems() -> list[str]:
    """A line for each, naming the GPU; empty for a machine without any. What cannot be read is not reported."""
    if not hardware.installed_gpus():
        return []
    report = _output("nvidia-smi", "-q", "-x")
    if report is None:
        return [f"nvidia-smi -q gives no answer within {SECONDS} s: a GPU may hang"]
    return [*of_report(report), *of_kernel_log(_output("dmesg") or "")]


def _output(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def of_report(xml: str) -> list[str]:
    """What `nvidia-smi -q -x` says is wrong."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return ["nvidia-smi -q: its answer cannot be read"]
    return [
        f"GPU {number} ({_text(gpu, 'product_name')}): {line}"
        for number, gpu in enumerate(root.iter("gpu"))
        for line in [*_memory(gpu), *_clocks(gpu), *_wanted(gpu)]
    ]


def _memory(gpu: ElementTree.Element) -> list[str]:
    found = []
    volatile = gpu.find("ecc_errors/volatile")
    if volatile is not None:
        uncorrectable = sum(
            int(leaf.text or "")
            for leaf in volatile.iter()
            if ("uncorrectable" in leaf.tag or leaf.tag == "double_bit") and (leaf.text or "").strip().isdigit()
        )
        if uncorrectable:
            found.append(f"{uncorrectable} uncorrectable memory errors since the driver was loaded: do not train on it")
    if _text(gpu, "remapped_rows/remapped_row_failure") == "Yes":
        found.append("a broken row of memory could not be replaced: have the GPU exchanged")
    elif "Yes" in (_text(gpu, "remapped_rows/remapped_row_pending"), _text(gpu, "retired_pages/pending_retirement")):
        found.append("a broken part of memory waits to be replaced: reset the GPU or reboot")
    return found


def _clocks(gpu: ElementTree.Element) -> list[str]:
    active = {leaf.tag for leaf in gpu.iter() if (leaf.text or "").strip() == "Active"}
    why = [reason for name, reason in _SLOWED.items() if any(tag.endswith(f"_reason_{name}") for tag in active)]
    heat = _text(gpu, "temperature/gpu_temp")
    return [f"its clock is slowed ({why[0]}), at {heat}: look at cooling and power"] if why else []


def _wanted(gpu: ElementTree.Element) -> list[str]:
    action = _text(gpu, "gpu_recovery_action")
    return [] if action in ("", "None", "N/A") else [f"the driver wants: {action.lower()}"]


def _text(gpu: ElementTree.Element, path: str) -> str:
    return (gpu.findtext(path) or "").strip()


def of_kernel_log(text: str) -> list[str]:
    """Faults of the hardware among the log's Xid messages: of each GPU and kind the last, and how many there are."""
    found: dict[tuple[str, int], list[str]] = {}
    for line in text.splitlines():
        if (match := _XID.search(line)) is not None and int(match["number"]) not in _OF_PROGRAMS:
            found.setdefault((match["bus"], int(match["number"])), []).append(match["text"].strip())
    return [_shown(bus, number, texts) for (bus, number), texts in found.items()]


def _shown(bus: str, number: int, texts: Sequence[str]) -> str:
    times = f", {len(texts)} times" if len(texts) > 1 else ""
    return f"GPU at {bus}: Xid {number}{times}: {texts[-1][:120]}"
