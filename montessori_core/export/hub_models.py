"""Models of a run that are on the Hugging Face hub, so that what is published can name them."""

from dataclasses import dataclass
from pathlib import Path

from montessori_core import layout
from montessori_core.config import Student, Teacher
from montessori_core.files import read_json
from montessori_core.models.adapters import base_of
from montessori_core.models.fetch import cached_model, commit_of


@dataclass(frozen=True)
class HubModel:
    """A model on the hub: its id and commit."""

    id: str
    commit: str


def configured_on_hub(run: Path, section: Student | Teacher) -> HubModel | None:
    """Return a configured model of a run; None if the run recorded no commit of it, as of a local folder."""
    commits = read_json(run / layout.MODEL_COMMITS) or {}
    commit = commits.get(f"{section.model}@{section.revision or 'main'}")
    return HubModel(section.model, commit) if commit and is_id(section.model) else None


def models_on_hub(run: Path) -> set[str]:
    """Return the ids of the models that a run read from the hub."""
    names = (name.rpartition("@")[0] for name in read_json(run / layout.MODEL_COMMITS) or {})
    return {name for name in names if is_id(name)}


def base_on_hub(adapter: Path, run: Path, section: Student | Teacher) -> HubModel | None:
    """Return the base model of an adapter that a run trained; None if it is not on the hub.

    Args:
        adapter: folder of the adapter.
        run: folder of the run.
        section: its configuration of the model.

    Raises:
        UserError: the settings of the adapter are damaged.
    """
    base = base_of(adapter)
    folder = Path(base)
    if (commit := commit_of(folder)) is not None:
        return HubModel(folder.parent.parent.name.removeprefix("models--").replace("--", "/"), commit)
    if folder.is_absolute() and folder.parent.name == layout.MODELS:  # the configured model with another chat template
        return configured_on_hub(run, section)
    return cached_on_hub(base)


def cached_on_hub(model: str, revision: str | None = None) -> HubModel | None:
    """Return a configured model, if this machine read it from the hub; None if it did not, as of a local folder."""
    if not is_id(model) or Path(model).exists() or (cached := cached_model(model, revision)) is None:
        return None
    return HubModel(model, cached.name)


def is_id(model: str) -> bool:
    """Return whether a configured model can be an id on the hub: OWNER/NAME, or NAME of an old one."""
    return not model.startswith(("/", "~", ".")) and model.count("/") <= 1
