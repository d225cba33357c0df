"""Manifests for a cluster: each pod by Kubernetes' own schema, what holds the pods by ours, after their docs."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

HERE = Path(__file__).parents[2]
MANIFESTS = HERE / "deployments" / "kubernetes"
KUBERNETES = "1.33"


def closed(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object of these fields and no others."""
    return {
        "type": "object", "properties": required | optional, "required": list(required),
        "additionalProperties": False,
    }  # fmt: skip


TEXT, COUNT, YES, ANY = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}

RAY_CLUSTER = closed(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": closed({"name": TEXT}, namespace=TEXT, labels=TEXTS),
        "spec": closed(
            {
                "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
                "headGroupSpec": closed({"rayStartParams": TEXTS, "template": ANY}, serviceType={"const": "ClusterIP"}),
                "workerGroupSpecs": {
                    "type": "array", "minItems": 1,
                    "items": closed(
                        {
                            "groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT,
                            "rayStartParams": TEXTS, "template": ANY,
                        }
                    ),
                },
            },
            authOptions=closed({"mode": {"enum": ["disabled", "token"]}}, secretName=TEXT),
        ),
    }
)  # fmt: skip
"""RayCluster of KubeRay 1.5.1 and newer, as far as we use it."""

ROOM = closed({}, cpu=TEXT, memory=TEXT)
WORKER_VALUES = closed(
    {
        "worker": closed(
            {
                "image": closed({"repository": TEXT, "prefectTag": TEXT}),
                "config": closed(
                    {"workPool": TEXT, "type": {"const": "kubernetes"}},
                    workQueues={"type": "array", "items": TEXT}, limit=COUNT,
                    installPolicy={"enum": ["always", "if-not-present", "never", "prompt"]},
                    baseJobTemplate=closed({"existingConfigMapName": TEXT}),
                ),
                "apiConfig": {"enum": ["cloud", "selfManagedCloud", "selfHostedServer"]},
                "selfHostedServerApiConfig": closed(
                    {"apiUrl": TEXT}, uiUrl=TEXT, basicAuth=closed({"enabled": YES}, existingSecret=TEXT)
                ),
                "resources": closed({"requests": ROOM, "limits": ROOM}),
                "podSecurityContext": ANY, "containerSecurityContext": ANY,
            },
            replicaCount=COUNT,
            extraEnvVars={"type": "array", "items": closed({"name": TEXT, "value": {"type": "string"}})},
        )
    },
    serviceAccount=closed({"create": YES}), role=closed({"create": YES}), rolebinding=closed({"create": YES}),
)  # fmt: skip
"""Values of Prefect's chart for workers, 2025.3 and newer, as far as we use them."""


def read(name: str) -> Any:
    return yaml.safe_load((MANIFESTS / name).read_text())


def as_pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}


def pods(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def test_every_manifest_is_checked_here() -> None:
    assert {path.name for path in MANIFESTS.iterdir()} == {"ray-cluster.yaml", "worker-values.yaml"}


def test_the_ray_cluster_is_one_and_its_pods_are_pods() -> None:
    cluster = read("ray-cluster.yaml")
    jsonschema.validate(cluster, RAY_CLUSTER)
    for spec in pods(cluster):
        kubernetes_validate.validate(as_pod(spec), KUBERNETES, strict=True)
    for broken in ({"imagePullpolicy": "Always"}, {"volumeMounts": "runs"}):  # the checks see what is wrong
        spec = deepcopy(next(pods(cluster)))
        spec["containers"][0] |= broken
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(as_pod(spec), KUBERNETES, strict=True)


def test_ray_is_the_locks_and_every_node_has_the_same_image_and_folder() -> None:
    cluster = read("ray-cluster.yaml")
    locked = next(line for line in (HERE / "requirements" / "cpu.lock").read_text().splitlines() if "ray==" in line)
    assert cluster["spec"]["rayVersion"] == locked.partition("==")[2].split()[0]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    containers = [spec["containers"][0] for spec in pods(cluster)]
    assert len({one["image"] for one in containers}) == 1
    assert all({"name": "runs", "mountPath": "/srlm/runs"} in one["volumeMounts"] for one in containers)


def test_the_workers_values_name_what_is_there() -> None:
    values = read("worker-values.yaml")
    jsonschema.validate(values, WORKER_VALUES)
    worker = values["worker"]
    container = {
        "name": "worker", "image": "i", "env": worker["extraEnvVars"], "resources": worker["resources"],
        "securityContext": worker["containerSecurityContext"],
    }  # fmt: skip
    spec = {"containers": [container], "securityContext": worker["podSecurityContext"]}
    kubernetes_validate.validate(as_pod(spec), KUBERNETES, strict=True)
    described = yaml.safe_load((HERE / "deployments" / "prefect.yaml").read_text())
    assert worker["image"]["prefectTag"].startswith(f"{described['prefect-version']}-")
    pools = {(one["work_pool"]["name"], one["work_pool"]["work_queue_name"]) for one in described["deployments"]}
    assert pools == {(worker["config"]["workPool"], queue) for queue in worker["config"]["workQueues"]}
