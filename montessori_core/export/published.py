"""What is published of a run's configuration and provenance: nothing that describes a site, and no local path."""

from collections.abc import Iterator, Mapping
from typing import Any

from montessori_core.config import Experiment
from montessori_core.export.sets import name_of

_PRIVATE = ("base_url", "key_variable", "cluster")  # settings that describe a site
_PUBLIC_MACHINE = ("processor", "generation_dtype")  # of the driver's machine: these change what a model generates


def published_settings(experiment: Experiment) -> dict[str, Any]:
    """Return all settings without those that describe a site; PATH stands for the folder of a local path."""
    return dict(_published(experiment.model_dump(mode="json")))


def published_changes(experiment: Experiment) -> dict[str, Any]:
    """Return `published_settings` that differ from the defaults."""
    content = experiment.model_dump(mode="json", exclude_defaults=True)
    for name in ("filters", "strategy"):  # the name of an entry is a default too
        if name in content.get("synthesis", {}):
            content["synthesis"][name] = experiment.model_dump(mode="json")["synthesis"][name]
    return dict(_published(content))


def published_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `provenance.json` without what describes the site of the driver."""
    driver = provenance.get("driver", {})
    machine = {name: driver[name] for name in _PUBLIC_MACHINE if name in driver}
    return {**provenance, "driver": machine} if "driver" in provenance else dict(provenance)


def _published(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if name not in _PRIVATE:
            yield name, _shortened(value)


def _shortened(value: Any) -> Any:
    """Return plain data with local paths as PATH and their last part."""
    if isinstance(value, dict):
        return dict(_published(value))
    if isinstance(value, list):
        return [_shortened(entry) for entry in value]
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")) and "\n" not in value:
        return f"PATH/{name_of(value)}"
    return value
