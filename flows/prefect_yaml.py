"""Read the deployments of a `prefect.yaml` and their configurations."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from montessori_core.config import Experiment, Section, Study, Tailored, parse, parse_yaml, read_yaml
from montessori_core.errors import ConfigError
from montessori_core.presets import find_configuration

if TYPE_CHECKING:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitConfig

EXPERIMENT = "flows/experiment.py:montessori"
STUDY = "flows/study.py:compare"
EVALUATION = "flows/evaluation.py:evaluate"
TAILOR = "flows/tailor.py:tailor"
Built = TypeVar("Built")
_PARAMETERS: dict[str, tuple[str, type[Section]]] = {
    EXPERIMENT: ("experiment", Experiment),
    STUDY: ("study", Study),
    EVALUATION: ("experiment", Experiment),
    TAILOR: ("tailored", Tailored),
}
_TYPES: dict[str, tuple[Any, str]] = {
    "description": (str, "a text"),
    "tags": (list, "a list"),
    "schedules": (list, "a list"),
    "job_variables": (dict, "a mapping"),
}
"""Types of the settings of a deployment that are taken as they are, and their names in YAML."""
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
        _complete(deployment, path)
    return deployments


def _complete(deployment: dict[str, Any], path: Path) -> None:
    source = f"{path}, deployment {deployment.get('name')!r}"
    if not isinstance(deployment.get("name"), str):
        raise ConfigError(f"{source}: name must be a text; set it")
    _refuse_unknown(deployment, ("name", "entrypoint", "config", "parameters", "concurrency_limit", *_TYPES), source)
    for key, (expected, words) in _TYPES.items():
        if not isinstance(deployment.get(key), expected | None):
            raise ConfigError(f"{source}: {key} must be {words}; correct it")
    deployment["schedules"] = [_schedule(schedule, source) for schedule in deployment.get("schedules") or []]
    deployment["concurrency_limit"] = _limit(deployment.get("concurrency_limit"), source)
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


def _refuse_unknown(content: Mapping[str, Any], known: Collection[str], source: str) -> None:
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise ConfigError(f"{source}: no setting {unknown[0]!r}; available: {', '.join(known)}")


def _schedule(content: Any, source: str) -> "DeploymentScheduleCreate":
    """Return a schedule as Prefect takes it."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate  # slow, and most commands need none
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

    source = f"{source}: schedules: {content}"
    if not isinstance(content, dict) or len(content.keys() & {"cron", "interval"}) != 1:
        raise ConfigError(f"{source}: set either cron, or interval (seconds)")
    _refuse_unknown(content, ("cron", "interval", "timezone", "active"), source)
    times = {key: value for key, value in content.items() if key != "active"}
    kind = CronSchedule if "cron" in content else IntervalSchedule
    return _valid(lambda: DeploymentScheduleCreate(schedule=kind(**times), active=content.get("active", True)), source)


def _limit(content: Any, source: str) -> "int | ConcurrencyLimitConfig | None":
    """Return how many flow runs of a deployment run at a time, as Prefect takes it."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig

    source = f"{source}: concurrency_limit: {content}"
    limit: int | ConcurrencyLimitConfig | None = content
    number = content
    if isinstance(content, dict):
        _refuse_unknown(content, tuple(ConcurrencyLimitConfig.model_fields), source)
        config = _valid(lambda: ConcurrencyLimitConfig(**content), source)
        limit, number = config, config.limit
    if number is not None and (type(number) is not int or number < 1):
        raise ConfigError(f"{source}: set a number from 1, or limit and collision_strategy (ENQUEUE or CANCEL_NEW)")
    return limit


def _valid(build: Callable[[], Built], source: str) -> Built:
    """Return what a model of Prefect makes of a setting.

    Raises:
        ConfigError: the setting is not valid.
    """
    try:
        return build()
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(f"{source}: {'; '.join(problems)}") from error


def _read_content(config: Path, kind: type[Section], folder: Path) -> dict[str, Any]:
    """Read a configuration without adding defaults: Prefect's form adds them."""
    if kind is Experiment:
        return read_yaml(find_configuration(config, folder=folder))
    path = find_configuration(config, "studies", folder)
    content = read_yaml(path)
    if isinstance(content.get("experiment"), str):
        content["experiment"] = _read_content(Path(content["experiment"]), Experiment, path.parent)
    return content
