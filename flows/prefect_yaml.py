"""Read the deployments of a `prefect.yaml` and their configurations."""

from pathlib import Path
from typing import Any

from montessori_core.config import Experiment, Section, Study, Tailored, parse, parse_yaml, read_yaml
from montessori_core.errors import ConfigError
from montessori_core.presets import find_configuration

EXPERIMENT = "flows/experiment.py:montessori"
STUDY = "flows/study.py:compare"
EVALUATION = "flows/evaluation.py:evaluate"
TAILOR = "flows/tailor.py:tailor"
_PARAMETERS: dict[str, tuple[str, type[Section]]] = {
    EXPERIMENT: ("experiment", Experiment),
    STUDY: ("study", Study),
    EVALUATION: ("experiment", Experiment),
    TAILOR: ("tailored", Tailored),
}
_SHIPPED = Path(__file__).with_name("prefect.yaml")


def find_deployments() -> Path:
    """Return the `prefect.yaml` of the current folder, or the shipped one."""
    path = Path("prefect.yaml")
    return path if path.exists() else _SHIPPED


def read_deployments(path: Path) -> list[dict[str, Any]]:
    """Read the deployments of a `prefect.yaml`; turn `config` into a parameter of the flow, and validate parameters.

    Raises:
        ConfigError: the file cannot be read, or a deployment is invalid.
    """
    try:
        deployments: list[dict[str, Any]] = parse_yaml(path.read_text(encoding="utf-8"), str(path))["deployments"]
        if not all(isinstance(deployment, dict) for deployment in deployments):
            raise TypeError("each deployment is a mapping")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name Prefect's file with --file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a file of deployments ({error}); see the shipped one, {_SHIPPED}") from error
    for deployment in deployments:
        _complete_parameters(deployment, path)
    return deployments


def _complete_parameters(deployment: dict[str, Any], path: Path) -> None:
    source = f"{path}, deployment {deployment.get('name')!r}"
    if not isinstance(deployment.get("name"), str):
        raise ConfigError(f"{source}: name must be a text; set it")
    for schedule in deployment.get("schedules") or []:
        if not isinstance(schedule, dict) or len(schedule.keys() & {"cron", "interval"}) != 1:
            raise ConfigError(f"{source}: schedules: {schedule}: set either cron, or interval (seconds)")
    entrypoint = deployment.setdefault("entrypoint", EXPERIMENT)
    if not isinstance(entrypoint, str) or entrypoint not in _PARAMETERS:
        raise ConfigError(f"{source}: no entrypoint {entrypoint!r}; available: {', '.join(_PARAMETERS)}")
    parameter, kind = _PARAMETERS[entrypoint]
    parameters = deployment["parameters"] = deployment.get("parameters") or {}
    config = deployment.pop("config", None)
    if not isinstance(parameters, dict) or (config is None) == (parameter not in parameters):
        raise ConfigError(
            f"{source}: set either config (a preset, or a path relative to this file) or parameters.{parameter}"
        )
    if config is not None:
        try:
            parameters[parameter] = _read_content(Path(str(config)), kind, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{source}: config: {error}") from error
    parse(kind, parameters[parameter], f"{source}: the configuration")


def _read_content(config: Path, kind: type[Section], folder: Path) -> dict[str, Any]:
    """Read a configuration without adding defaults: Prefect's form adds them."""
    if kind is Experiment:
        return read_yaml(find_configuration(config, folder=folder))
    path = find_configuration(config, "studies", folder)
    content = read_yaml(path)
    if isinstance(content.get("experiment"), str):
        content["experiment"] = _read_content(Path(content["experiment"]), Experiment, path.parent)
    return content
