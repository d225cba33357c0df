"""What is deployed by others' programs: parsed here, and held against what they expect."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deployments import stack

HERE = Path(__file__).parents[2]
POOLS = HERE / "deployments" / "work_pools"


def compose() -> dict[str, Any]:
    return yaml.safe_load((HERE / "docker-compose.yml").read_text())


def test_the_stack_runs_the_commands_of_the_compose_file() -> None:
    """Word for word: what is tested as processes is what the images run."""
    services, run = compose()["services"], stack.commands()
    for name in (*stack.SERVERS, stack.SET_UP, stack.WORKER):
        assert run[name] == shlex.split(stack.interpolated(services[name]["command"]))
        assert run[name][0] in ("prefect", "mlflow", "sh")
    images = [path.read_text() for path in (HERE / "deployments" / "docker").glob("*.Dockerfile")]
    entry = json.dumps(["sh", f"/srlm/{stack.ENTRYPOINT.relative_to(HERE)}"])
    assert len(images) == 2
    assert all(f"ENTRYPOINT {entry}" in image for image in images)


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("a ${X:-b} c", {}, "a b c"),
        ("a ${X:-b} c", {"X": "d"}, "a d c"),
        ("m ${X:+--app-name basic-auth}", {}, "m "),
        ("m ${X:+--app-name basic-auth}", {"X": "u:p"}, "m --app-name basic-auth"),
        ("${X}${Y}", {"X": "1"}, "1"),
    ],
)
def test_variables_are_filled_in_as_compose_does(text: str, environment: dict[str, str], expected: str) -> None:
    assert stack.interpolated(text, environment) == expected


def test_nothing_of_the_stack_is_reachable_from_outside_and_no_secret_is_written_down() -> None:
    for name, service in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service.get("privileged") is None
        for value in map(str, service.get("environment", {}).values()):
            assert not re.search(r"(password|secret|token)\s*[=:]\s*\w", value, re.IGNORECASE), value
    example = (HERE / "deployments" / "env.example").read_text()
    assert re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE) == [("SRLM_POSTGRES_PASSWORD", "")]


def test_images_are_pinned() -> None:
    named = [service["image"] for service in compose()["services"].values()]
    files = "\n".join(path.read_text() for path in (HERE / "deployments").rglob("*.Dockerfile"))
    named += re.findall(r"^FROM (\S+)", files, re.MULTILINE)
    for image in named:
        _, _, tag = stack.interpolated(image, {}).rpartition(":")
        assert re.search(r"\d+\.\d+", tag), image


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_pools_template_uses_what_it_declares_and_declares_what_it_uses(kind: str) -> None:
    template = json.loads((POOLS / f"{kind}.json").read_text())
    variables = template["variables"]["properties"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(variables)
    assert all({"title", "description", "type"} <= set(one) for one in variables.values())


def test_prefect_fills_in_the_job_of_a_kubernetes_pool() -> None:
    """By Prefect's own templating, with the pool's defaults; Kubernetes' schema is held against what comes out."""
    from prefect.utilities.templating import apply_values

    template = json.loads((POOLS / "kubernetes.json").read_text())
    values = {name: one["default"] for name, one in template["variables"]["properties"].items() if "default" in one}
    values |= {"name": "first", "labels": {}, "command": ["python", "-m", "prefect.engine"], "gpus": 8}
    job = apply_values(template["job_configuration"]["job_manifest"], values)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 8}
    assert container["volumeMounts"][0] == {"name": "runs", "mountPath": "/srlm/runs"}
    assert pod["securityContext"]["runAsNonRoot"]
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    kubernetes_validate.validate(job | {"metadata": job["metadata"] | {"name": "first"}}, "1.33", strict=True)


def test_every_deployment_names_a_flow_that_is_there_and_parameters_that_it_takes() -> None:
    from prefect.flows import load_flow_from_entrypoint

    described = yaml.safe_load((HERE / "deployments" / "prefect.yaml").read_text())
    assert [one["name"] for one in described["deployments"]] == ["self-reward", "nightly-rerun", "evaluate", "compare"]
    for one in described["deployments"]:
        flow = load_flow_from_entrypoint(one["entrypoint"])
        assert set(one.get("parameters", {})) <= set(flow.parameters.properties)
        assert one["work_pool"]["name"] == "srlm"
    nightly = described["deployments"][1]
    assert nightly["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
