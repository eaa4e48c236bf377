"""What the compose file promises: a login is needed, and nothing is reached from other machines."""

from pathlib import Path

import yaml

COMPOSE = Path(__file__).parent.parent / "docker" / "compose.yaml"


def test_server_asks_for_a_login_and_listens_to_this_machine_only() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
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
    assert all(value.startswith("${") for value in secrets)
