"""The health of GPUs, from what drivers of three generations answer to `nvidia-smi -q -x` and write into the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain import hardware
from bigtrain.launch import gpu_health

# Driver 580, an H100 that is well and one that is not; shortened to what bears on health.
HEALTHY = """<gpu id="00000000:1B:00.0">
    <product_name>NVIDIA H100 80GB HBM3</product_name>
    <gpu_recovery_action>None</gpu_recovery_action>
    <ecc_errors>
        <volatile>
            <sram_correctable>0</sram_correctable>
            <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
            <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
            <dram_correctable>14</dram_correctable>
            <dram_uncorrectable>0</dram_uncorrectable>
        </volatile>
        <aggregate>
            <dram_uncorrectable>2</dram_uncorrectable>
        </aggregate>
    </ecc_errors>
    <remapped_rows>
        <remapped_row_corr>0</remapped_row_corr>
        <remapped_row_unc>1</remapped_row_unc>
        <remapped_row_pending>No</remapped_row_pending>
        <remapped_row_failure>No</remapped_row_failure>
    </remapped_rows>
    <temperature>
        <gpu_temp>34 C</gpu_temp>
    </temperature>
    <clocks_event_reasons>
        <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
        <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
        <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
    </clocks_event_reasons>
</gpu>"""
SICK = (
    HEALTHY.replace("<dram_uncorrectable>0", "<dram_uncorrectable>3")
    .replace("<sram_uncorrectable_parity>0", "<sram_uncorrectable_parity>1")
    .replace("<remapped_row_pending>No", "<remapped_row_pending>Yes")
    .replace("<gpu_recovery_action>None", "<gpu_recovery_action>Drain and Reset")
)
# Driver 470, an A100 that is too hot; its names for the clocks are older.
HOT = """<gpu id="00000000:07:00.0">
    <product_name>NVIDIA A100-SXM4-40GB</product_name>
    <clocks_throttle_reasons>
        <clocks_throttle_reason_hw_slowdown>Active</clocks_throttle_reason_hw_slowdown>
        <clocks_throttle_reason_hw_thermal_slowdown>Active</clocks_throttle_reason_hw_thermal_slowdown>
        <clocks_throttle_reason_sw_thermal_slowdown>Not Active</clocks_throttle_reason_sw_thermal_slowdown>
    </clocks_throttle_reasons>
    <ecc_errors>
        <volatile>
            <sram_uncorrectable>0</sram_uncorrectable>
            <dram_uncorrectable>0</dram_uncorrectable>
        </volatile>
    </ecc_errors>
    <temperature>
        <gpu_temp>91 C</gpu_temp>
    </temperature>
</gpu>"""
# Driver 525, a GPU without ECC.
PLAIN = """<gpu id="00000000:65:00.0">
    <product_name>NVIDIA GeForce RTX 3090</product_name>
    <ecc_errors><volatile>
        <sram_uncorrectable>N/A</sram_uncorrectable><dram_uncorrectable>N/A</dram_uncorrectable>
    </volatile></ecc_errors>
    <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
    <remapped_rows>N/A</remapped_rows>
</gpu>"""
LOG = """[ 8843.118] NVRM: Xid (PCI:0000:1b:00): 13, pid=79749, name=python, Graphics SM Warp Exception
[ 9001.001] NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>', name=<unknown>, An uncorrectable double bit error
[ 9002.004] NVRM: Xid (PCI:0000:3b:00): 79, pid=1122, GPU has fallen off the bus.
[ 9003.009] NVRM: Xid (PCI:0000:3b:00): 79, pid=1122, GPU has fallen off the bus.
[ 9004.000] eth0: link up
"""


def report(*gpus: str) -> str:
    head = '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>'
    return f"{head}<driver_version>580.95.05</driver_version>{''.join(gpus)}</nvidia_smi_log>"


def test_gpus_that_are_well_are_not_spoken_of() -> None:
    assert gpu_health.of_report(report(HEALTHY, PLAIN)) == []


def test_what_is_wrong_is_said_of_the_right_gpu() -> None:
    assert gpu_health.of_report(report(HEALTHY, SICK, HOT)) == [
        "GPU 1 (NVIDIA H100 80GB HBM3): 4 uncorrectable memory errors since the driver was loaded: do not train on it",
        "GPU 1 (NVIDIA H100 80GB HBM3): a broken part of memory waits to be replaced: reset the GPU or reboot",
        "GPU 1 (NVIDIA H100 80GB HBM3): the driver wants: drain and reset",
        "GPU 2 (NVIDIA A100-SXM4-40GB): its clock is slowed (too hot), at 91 C: look at cooling and power",
    ]
    assert gpu_health.of_report("Unable to determine the device handle") == ["nvidia-smi -q: its answer cannot be read"]


def test_the_kernels_log_tells_faults_of_the_hardware_from_those_of_programs() -> None:
    lines = gpu_health.of_kernel_log(LOG)
    assert len(lines) == 2
    assert lines[0].startswith("GPU at 0000:3b:00: Xid 48: ")
    assert lines[1] == "GPU at 0000:3b:00: Xid 79, 2 times: pid=1122, GPU has fallen off the bus."


def test_they_are_asked_through_the_drivers_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answer.xml").write_text(report(HEALTHY, HOT))
    program = tmp_path / "nvidia-smi"
    listed = "0, GPU-1, NVIDIA H100, 9.0, 81559\\n1, GPU-2, NVIDIA A100, 8.0, 40960"
    program.write_text(f'#!/bin/sh\ncase "$1" in -q) cat {tmp_path}/answer.xml;; *) printf "{listed}\\n";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    hardware.installed_gpus.cache_clear()
    try:
        found = gpu_health.problems()
    finally:
        monkeypatch.undo()
        hardware.installed_gpus.cache_clear()
    assert [line for line in found if line.startswith("GPU 1")] == [
        "GPU 1 (NVIDIA A100-SXM4-40GB): its clock is slowed (too hot), at 91 C: look at cooling and power"
    ]
