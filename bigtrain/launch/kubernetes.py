"""launch=kubernetes: an indexed Job, a pod for each node, and the headless Service by which the pods find the first.

When a pod fails the others lose it and fail too; the Job makes them anew, and the run goes on from its last checkpoint.
The volume holds run_dir and the prepared data; the command runs where it is mounted at the same path.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import yaml

from bigtrain.config import Config
from bigtrain.errors import ConfigError
from bigtrain.hardware import Placement

_QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTPE]i?)?")
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?")


def name(config: Config) -> str:
    """A DNS label, short enough for the pods' own numbers to fit behind it."""
    chosen = config.launch.kubernetes.name
    if chosen is None:
        text = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(config.run_dir).name.lower())[:40].strip("-")
        return f"bigtrain-{text}" if text else "bigtrain"
    return chosen


def first_pod(config: Config) -> str:
    return f"{name(config)}-0.{name(config)}"


def check(config: Config) -> None:
    """Raises ConfigError for what the cluster would refuse, or what would not be found in a pod."""
    ours = config.launch.kubernetes
    for field in ("name", "namespace", "volume_claim", "variables_from"):
        value = getattr(ours, field)
        if value is not None and not _NAME.fullmatch(value):
            raise ConfigError(
                f"launch.kubernetes.{field}", value, "not a name that Kubernetes takes", "a-z, 0-9 and -, at most 52"
            )
    for field in ("cpu", "memory", "shared_memory"):
        value = getattr(ours, field)
        if value is not None and not _QUANTITY.fullmatch(value):
            raise ConfigError(f"launch.kubernetes.{field}", value, "not a quantity", "as Kubernetes writes it: 8, 64Gi")
    if ours.volume_claim is not None:
        mount = PurePosixPath(ours.mount_path)
        for field, path in (("run_dir", config.run_dir), ("data.cache_dir", config.data.cache_dir)):
            if mount not in PurePosixPath(path).parents:
                raise ConfigError(
                    field, path, "not on the volume that the pods have",
                    f"name a directory below launch.kubernetes.mount_path={mount}",
                )  # fmt: skip


def manifest(config: Config, placement: Placement, words: list[str], environment: dict[str, str]) -> str:
    """The two objects as YAML. `words`: what a pod runs, with $(NODE_RANK) for its number."""
    ours, label = config.launch.kubernetes, {"app.kubernetes.io/name": name(config)}
    metadata = {"name": name(config), "namespace": ours.namespace, "labels": label}
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "clusterIP": "None", "selector": label, "publishNotReadyAddresses": True,
            "ports": [{"name": "master", "port": config.launch.master_port or 29500}],
        },
    }  # fmt: skip
    amounts: dict[str, Any] = {}
    if placement.device == "cuda":
        amounts["nvidia.com/gpu"] = placement.ranks
    amounts |= {field: value for field in ("cpu", "memory") if (value := getattr(ours, field)) is not None}
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": ours.shared_memory}}
    ]
    if ours.volume_claim is not None:
        mounts.append({"name": "work", "mountPath": ours.mount_path})
        volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": ours.volume_claim}})
    container: dict[str, Any] = {
        "name": "ranks", "image": ours.image, "command": ["python", *words[1:]],
        "env": [
            {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}},
            # a $ of a value must not be taken for a reference
            *({"name": key, "value": value.replace("$(", "$$(")} for key, value in environment.items()),
        ],
        "resources": {"requests": amounts, "limits": amounts}, "volumeMounts": mounts,
    }  # fmt: skip
    if ours.variables_from is not None:
        container["envFrom"] = [{"secretRef": {"name": ours.variables_from}}]
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": metadata,
        "spec": {
            "completions": placement.nodes, "parallelism": placement.nodes, "completionMode": "Indexed",
            "backoffLimit": config.launch.restarts * placement.nodes,
            "template": {
                "metadata": {"labels": label},
                "spec": {
                    "subdomain": name(config), "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": config.launch.stop_seconds,
                    "containers": [container], "volumes": volumes,
                },
            },
        },
    }  # fmt: skip
    return yaml.dump_all([service, job], Dumper=_Plain, sort_keys=False, width=4096)


class _Plain(yaml.SafeDumper):
    """Without anchors, which readers of manifests do not expect."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
