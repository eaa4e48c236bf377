"""What is published of a run's configuration and provenance: nothing that describes a site, and no local path."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from montessori_core import layout
from montessori_core.config import Experiment
from montessori_core.data.origins import read_origins
from montessori_core.data.shards import is_url
from montessori_core.export.hub_models import is_id, models_on_hub

PRIVATE = {"base_url", "key_variable", "cluster"}
"""Settings that describe a site."""
PATHS = {
    *("path", "model", "documents", "chat_template", "name"),
    *("task_folder", "alpaca_eval", "alpaca_eval_difficulty", "mt_bench", "mt_bench_references"),
}
"""Settings that hold a path, or the name of a model, data set or benchmark."""
FREE_FORM = {"settings", "engine_options", "parameters", "chat_template_kwargs"}
"""Mappings whose values may be paths, such as the settings of a custom filter."""
_PATH = re.compile(r"(?:/|~|\.\.?/).*|[^\s<>]+/[^\s<>]+")  # of a free-form setting
_PUBLIC_MACHINE = ("processor", "generation_dtype")  # of the driver's machine: these change what a model generates


def published_settings(run: Path, experiment: Experiment) -> dict[str, Any]:
    """Return all settings of a run without those that describe a site.

    PATH stands for the folder of a path. Ids of the hub are kept, as the run recorded the commits of what it read there.

    Args:
        run: folder of the run.
        experiment: its configuration.
    """
    return dict(_published(experiment.model_dump(mode="json"), public_names(run, experiment)))


def published_changes(run: Path, experiment: Experiment) -> dict[str, Any]:
    """Return `published_settings` that differ from the defaults."""
    content = experiment.model_dump(mode="json", exclude_defaults=True)
    for name in ("filters", "strategy"):  # the name of an entry is a default too
        if name in content.get("synthesis", {}):
            content["synthesis"][name] = experiment.model_dump(mode="json")["synthesis"][name]
    return dict(_published(content, public_names(run, experiment)))


def published_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `provenance.json` without what describes the site of the driver."""
    driver = provenance.get("driver", {})
    machine = {name: driver[name] for name in _PUBLIC_MACHINE if name in driver}
    return {**provenance, "driver": machine} if "driver" in provenance else dict(provenance)


def name_of(name: str, public: Collection[str]) -> str:
    """Return the name of a model or data set for publication: of a path only the last part.

    Args:
        name: as in a configuration.
        public: names that are no paths, see `public_names`.
    """
    return name if name in public or name.startswith("builtin/") or "/" not in name else _last_part(name)


def public_names(run: Path, experiment: Experiment) -> set[str]:
    """Return the models and data sets that a run read from the hub, by its record, and its models behind an API."""
    origins = read_origins(run / layout.ORIGINS)
    data = {getattr(experiment, name).path for name, origin in origins.items() if origin.commit}
    endpoints = (experiment.judge, experiment.strong_teacher, experiment.answerer)
    return models_on_hub(run) | {
        name for name in (*data, *(endpoint.model for endpoint in endpoints if endpoint)) if is_id(name)
    }


def _published(content: Mapping[str, Any], public: set[str], free_form: bool = False) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if name not in PRIVATE:
            yield name, _shortened(name, value, public, free_form or name in FREE_FORM)


def _shortened(name: str, value: Any, public: set[str], free_form: bool) -> Any:
    """Return the value of a setting with paths as PATH and their last part, but for public names.

    A text of a free-form setting is taken for a path if it looks like one; of another setting, by the setting's name.
    """
    if isinstance(value, dict):
        return dict(_published(value, public, free_form))
    if isinstance(value, list):
        return [_shortened(name, entry, public, free_form) for entry in value]
    if not isinstance(value, str) or value in public or value.startswith("builtin/"):
        return value
    is_path = "/" in value if name in PATHS else free_form and _PATH.fullmatch(value)
    return f"PATH/{_last_part(value)}" if is_path else value


def _last_part(path: str) -> str:
    """Return the last part of a path; the query of a URL may be a signature."""
    return Path(re.sub(r"[?#].*", "", path, flags=re.DOTALL) if is_url(path) else path).name
