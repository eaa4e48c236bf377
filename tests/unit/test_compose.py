"""Images and compose files: a login, no open ports, no root, no secrets."""

import re
import subprocess

import pytest
import yaml

from flows.local_server import server_environment
from montessori_core.config import read_cluster
from support import ROOT

DOCKER = ROOT / "docker"


@pytest.mark.guarantee("runs started on your Prefect server")
def test_compose_server_is_local_and_needs_login() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert services["server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"].startswith(
        "${MONTESSORI_PREFECT_LOGIN:?"
    )
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    secrets = [
        value
        for service in services.values()
        for name, value in service["environment"].items()
        if "PASSWORD" in name or "AUTH" in name
    ]
    assert secrets
    assert all(value.startswith("${") for value in secrets)
    assert all("healthcheck" in service for service in services.values())


def test_compose_server_keeps_slots_over_a_restart() -> None:
    environment = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["server"]["environment"]
    setting = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
    assert environment[setting] == server_environment(4200)[setting]


def test_slurm_containers_match_their_configuration() -> None:
    services = yaml.safe_load((DOCKER / "slurm" / "compose.yaml").read_text())["services"]
    configuration = dict(
        line.split("=", 1) for line in (DOCKER / "slurm" / "slurm.conf").read_text().splitlines() if line[0] != "#"
    )
    assert configuration["SlurmctldHost"] == "controller"
    assert configuration["NodeName"].startswith("node[1-2] ")
    assert {service["hostname"] for service in services.values()} == {"controller", "node1", "node2"} == set(services)
    assert not any("ports" in service for service in services.values())
    assert read_cluster(DOCKER / "slurm" / "cluster.yaml").slurm.partition == "main"


def test_slurm_image_makes_a_target_of_the_makefile() -> None:
    (command,) = re.findall(r"^RUN (make .+)$", (DOCKER / "slurm" / "Dockerfile").read_text(), re.MULTILINE)
    planned = subprocess.run(["sh", "-c", f"TORCH=cpu; {command} --dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("name", ["driver", "worker"])
def test_images_install_locks_without_root(name: str) -> None:
    lines = (DOCKER / f"{name}.Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert any(f"make install-{name} " in line for line in lines)
    assert not any(re.search(r"pip install|^ARG|^ADD|password|token", line, re.IGNORECASE) for line in lines)
    ignored = (DOCKER.parent / ".dockerignore").read_text().splitlines()
    assert ignored[-1] == "**/.env*"  # Compose reads passwords from it
    assert "*" in ignored  # only named files, so that no secret of a checkout enters a layer
