"""conf/cluster: every preset is whole and says where its numbers are from; what is wrong in a file is named."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.errors import ConfigError
from bigtrain.plan import clusters
from bigtrain.plan.clusters import Cluster, Device


@pytest.mark.parametrize("name", clusters.presets())
def test_every_field_of_a_preset_has_a_source(name: str) -> None:
    wanted = {each.name for each in fields(Cluster)} - {"name", "device", "nodes", "source"}
    wanted |= {f"device.{each.name}" for each in fields(Device)} - {"device.name"}
    source = clusters.find(name).source
    assert set(source) == wanted
    assert all(text.strip() for text in source.values())


@pytest.mark.parametrize("name", clusters.presets())
def test_numbers_are_those_that_their_sources_give(name: str) -> None:
    cluster = clusters.find(name)
    source, device = cluster.source, cluster.device
    if terabytes := re.search(r"([\d.]+) TB/s", source["device.memory_gb_per_second"]):
        assert device.memory_gb_per_second == pytest.approx(1000 * float(terabytes[1]))
    if both := re.search(r"half of \S+ (\d+) GB/s in both", source["intra_node_gb_per_second"]):
        assert cluster.intra_node_gb_per_second == int(both[1]) / 2
    if both := re.search(r"half of (?:\S+ )?(?:\S+ )?(\d+) GB/s in both", source["host_link_gb_per_second"]):
        assert cluster.host_link_gb_per_second == int(both[1]) / 2
    if network := re.search(r"8 x (\d+) Gb/s", source["inter_node_gb_per_second"]):
        assert cluster.inter_node_gb_per_second == int(network[1]) / 8
    if drives := re.search(r"(\d) x 3.84 TB", source["disk_gib"]):
        assert cluster.disk_gib == pytest.approx(int(drives[1]) * 3.84e12 / 2**30, abs=1)
        each = re.search(r"at (\d+) GB/s of writing each", source["disk_gb_per_second"])
        assert each
        assert cluster.disk_gb_per_second == int(drives[1]) * int(each[1])
    if memory := re.search(r": (\d) TB$", source["host_memory_gib"]):
        assert cluster.host_memory_gib == 1024 * int(memory[1])


def test_any_number_of_devices() -> None:
    assert clusters.find("h100").devices == 8
    assert (clusters.find("h100x16384").nodes, clusters.find("h100x16384").devices) == (2048, 16384)
    assert (clusters.find("h100x2").nodes, clusters.find("h100x2").devices_per_node) == (1, 2)
    assert clusters.find("mi300xx16").nodes == clusters.find("mi300x16").nodes == 2


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("h10", "did you mean h100?"),
        ("h100x12", "a node has 8 devices; take h100x8 or h100x16"),
        ("h100x0", "at least one device is needed"),
        ("tpu", "one of a100_40gb,"),
        ("no/such.yaml", "no such file"),
        ("h100x8000000000", "10 digits of devices; take fewer than 1,000,000,000"),
        (f"own.yamlx{'8' * 5000}", "5000 digits of devices; take fewer than 1,000,000,000"),
    ],
)
def test_an_unknown_selector_is_refused_in_one_line(selector: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        clusters.find(selector)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"disk_gib": None}, "own.yaml: disk_gib: missing"),
    ({"device.watts": None}, "own.yaml: device.watts: missing"),
    ({"device": None}, "own.yaml: device: missing"),
    ({"host_memory_gib": -1}, "own.yaml.host_memory_gib=-1.0: must be above 0"),
    ({"price_per_device_hour": -0.5}, "own.yaml.price_per_device_hour=-0.5: must be at least 0"),
    ({"device.memory_gib": "plenty"}, "own.yaml.device.memory_gib='plenty': wrong type"),
    ({"hostmemory_gib": 5}, "own.yaml.hostmemory_gib: unknown key; did you mean own.yaml.host_memory_gib?"),
    ({"device.peak_tflops": {"bf16": 1.0}}, "own.yaml.device.peak_tflops.fp32: missing"),
    ({"device.peak_tflops": {"fp32": 0}}, "own.yaml.device.peak_tflops.fp32=0.0: must be above 0"),
]


@pytest.mark.parametrize(("changes", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_a_file_of_ones_own_and_what_can_be_wrong_with_it(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = yaml.safe_load((clusters._folder() / "h100.yaml").read_text())
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(data))
    assert clusters.find(f"{file}x64").nodes == 8
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        place = data[section] if section else data
        if value is None:
            del place[name]
        else:
            place[name] = value
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as caught:
        clusters.find(str(file))
    assert said in str(caught.value)
