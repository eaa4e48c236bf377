"""Model cards: what a student was trained on, and how."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from montessori_core import programs
from montessori_core.config import DataSource, Experiment, dump_yaml
from montessori_core.data.cards import CARD
from montessori_core.data.origins import Origin
from montessori_core.export.hub_models import HubModel, cached_on_hub
from montessori_core.export.markdown import escape, fenced, table
from montessori_core.export.published import name_of
from montessori_core.models.licences import licence_of

_NO_LICENCE = (
    " No licence is declared here: that of the data may bind the model; set `license` in the header before you publish."
)


def shared_licence(licences: Sequence[str | None]) -> str | None:
    """Return the licence of a trained model: that of the model before and of its data, if they are the same."""
    return licences[0] if len(set(licences)) == 1 else None


def model_header(base: HubModel | None, licence: str | None, tags: Sequence[str], adapter: bool = False) -> str:
    """Return the YAML header of a model's card.

    Args:
        base: the model that was trained; None if it is not on the hub: then it is not named.
        licence: see `shared_licence`; None declares none.
        tags: for the hub's search.
        adapter: whether the model is a LoRA adapter.
    """
    content: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["montessori", *tags],
    }
    if licence is not None:
        content["license"] = licence
    if base is not None:
        content["base_model"] = base.id
    return f"---\n{dump_yaml(content)}---\n"


def write_card(card: str, folder: Path) -> None:
    """Write the card of the model in a folder in place of PEFT's, whose file may be linked to that of another folder."""
    (folder / CARD).unlink(missing_ok=True)
    (folder / CARD).write_text(card, encoding="utf-8")


def student_card(
    experiment: Experiment,
    data: DataSource,
    origin: Origin,
    settings: programs.Sft,
    counts: Mapping[str, int],
    log: Sequence[Mapping[str, Any]],
    merged: bool = False,
) -> str:
    """Return the card of a student that was trained on any data.

    Args:
        experiment: names the student.
        data: the examples.
        origin: of the examples.
        settings: of the training.
        counts: numbers of examples, truncated ones and those left out.
        log: an entry per optimizer step.
        merged: whether the adapter was merged into its base model.
    """
    student = experiment.student
    base = cached_on_hub(student.model, student.revision)
    licence = licence_of(student.model, student.revision)
    declared = shared_licence([licence, origin.licence])
    public = [*([base.id] if base else []), *([data.path] if origin.commit else [])]
    name = escape(name_of(student.model, public))
    rows: list[tuple[str, object]] = [(key.replace("_", " "), value) for key, value in counts.items()]
    rows += [("licence of the data", origin.licence_text)]
    rows += [("commit of the data", origin.commit)] if origin.commit else []
    rows += [("loss of the first step, nats per token", log[0]["loss"])] if log else []
    rows += [("loss of the last step, nats per token", log[-1]["loss"])] if log else []
    parts = [
        model_header(base, declared, ["sft"], adapter=settings.lora is not None and not merged),
        f"# {name}, trained on {escape(name_of(data.path, public))}\n",
        f"{name} after supervised fine-tuning{' of a LoRA adapter' if settings.lora else ''}"
        f"{', merged into it,' if merged else ''} with Montessori; only "
        f"responses have loss. Licence of {name}: {licence or 'not known'}.{'' if declared else _NO_LICENCE}\n",
        f"## Data\n\n{table(('training data', ''), rows)}",
        f"## Training\n\n{fenced(dump_yaml(settings.model_dump(mode='json')), 'yaml')}",
    ]
    return "\n".join(parts)
