"""Export a trained model of a run: a copy with a model card, adapters merged on request."""

import shutil
from pathlib import Path
from typing import Any, Literal, get_args

from montessori_core import layout
from montessori_core.config import Experiment, Section, dump_yaml, read_experiment
from montessori_core.errors import DataError, UserError
from montessori_core.export.hub_models import configured_on_hub
from montessori_core.export.markdown import escape, fenced, table
from montessori_core.export.model_card import model_header, shared_licence, write_card
from montessori_core.export.published import name_of, public_names
from montessori_core.files import commit, read_json, refuse_existing
from montessori_core.formatting import task_name
from montessori_core.models.adapters import is_adapter
from montessori_core.models.fingerprints import FINGERPRINT, write_fingerprint
from montessori_core.models.licences import licence_of

Role = Literal["student", "teacher"]
ROLES: tuple[Role, ...] = get_args(Role)
UNPUBLISHED = shutil.ignore_patterns(layout.MOMENTS_FILE, layout.KEPT)
"""What is not exported of the folder of a trained model, for `shutil.copytree`."""


def model_folder(run: Path, role: Role, iteration: int | None = None) -> tuple[Path, int]:
    """Return the folder of a trained model and its iteration.

    Args:
        run: folder of the run.
        role: student or teacher.
        iteration: number of an iteration; None: the last that has the model.

    Raises:
        DataError: the run does not have the model (yet).
    """
    folders = {number: folder / role / "part-00000" for number, folder in layout.iterations(run).items()}
    present = [number for number, folder in folders.items() if folder.is_dir()]
    if not present or iteration not in (None, *present):
        which = f" of iteration {iteration}" if present else ""
        other = f"give --iteration {' or '.join(map(str, present))}, or " if present else ""
        raise DataError(f"{run}: no trained {role}{which}; {other}resume the run first")
    number = iteration or present[-1]
    return folders[number], number


def export_model(run: Path, role: Role, output: Path, iteration: int | None = None, merge: bool = False) -> Path:
    """Copy a trained model of a run to a new folder, with a model card; return the folder of the run's model.

    Args:
        run: folder of the run.
        role: student or teacher.
        output: the folder.
        iteration: number of an iteration; None: the last that has the model.
        merge: merge an adapter into its base model, in float32.

    Raises:
        UserError: the new folder exists, the run does not have the model, or there is no adapter to merge.
    """
    refuse_existing(output, "folder")
    folder, number = model_folder(run, role, iteration)
    if merge and not is_adapter(folder):
        raise UserError(f"{folder} has all weights, and no adapter to merge; leave out --merge")
    card = model_card(run, role, number, adapter=is_adapter(folder) and not merge)
    output.parent.mkdir(parents=True, exist_ok=True)
    with commit(output) as temporary:
        if merge:
            write_merged(folder, temporary)
        else:
            shutil.copytree(folder, temporary, ignore=UNPUBLISHED)
        write_card(card, temporary)
        refuse_existing(output, "folder")
    return folder


def write_merged(folder: Path, target: Path) -> None:
    """Merge the adapter in a folder into its base model, in float32; write model and tokenizer to the folder `target`."""
    import torch

    from montessori_core.models.load import load_merged, load_tokenizer

    load_merged(str(folder), torch.float32).save_pretrained(target)
    load_tokenizer(str(folder)).save_pretrained(target)
    (target / FINGERPRINT).unlink(missing_ok=True)
    write_fingerprint(target)


def model_card(run: Path, role: Role, iteration: int, adapter: bool) -> str:
    """Return the card of a trained model of a run.

    Args:
        run: folder of the run.
        role: student or teacher.
        iteration: its iteration, from 1.
        adapter: whether the folder has a LoRA adapter.
    """
    experiment = read_experiment(run / layout.CONFIG)
    base = experiment.student if role == "student" else experiment.teacher
    recipe: Section = experiment.training if role == "student" else experiment.teacher_update
    metrics = read_json(run / layout.iteration(iteration) / layout.METRICS) or {}
    counts = (metrics.get("training_counts") or {}).get(role, {})
    licences = _licences(run, experiment, role)
    declared = shared_licence([licence for _, _, licence in licences])
    tags = ["sft" if role == "student" else "dpo"]
    parts = [
        model_header(configured_on_hub(run, base), declared, tags, adapter),
        f"# {escape(experiment.name)}: {role} of iteration {iteration}\n",
        f"{_origin(run, experiment, role, iteration)}\n",
        f"## Licence\n\n{_licence_section(licences, declared)}",
        f"## Training\n\n{table(('training data', ''), [(key.replace('_', ' '), value) for key, value in counts.items()])}\n"
        f"{fenced(dump_yaml(recipe.model_dump(mode='json')), 'yaml')}",
    ]
    if scores := _scores(metrics, role):
        parts.append(f"## Scores\n\n{scores}")
    return "\n".join(parts)


def _origin(run: Path, experiment: Experiment, role: Role, iteration: int) -> str:
    """Return what the model was trained from, and on what."""
    public = public_names(run, experiment)
    student, teacher = (escape(name_of(part.model, public)) for part in (experiment.student, experiment.teacher))
    plural = "s" * (iteration > 1)
    if role == "student":
        return (
            f"{student} after supervised fine-tuning on the synthetic training set that {teacher} wrote after "
            f"{iteration} teacher update{plural} by Montessori."
        )
    return (
        f"{teacher} after {iteration} update{plural} by DPO with Montessori, to write instructions that help {student} on "
        f"the reference set {escape(name_of(experiment.reference.path, public))}."
    )


def _licences(run: Path, experiment: Experiment, role: Role) -> list[tuple[str, str, str | None]]:
    """Return role, name and licence of the trained model, and of those that wrote its training data; None if not known."""
    public = public_names(run, experiment)
    roles: tuple[Role, ...] = ("student", "teacher") if role == "student" else ("teacher",)
    rows: list[tuple[str, str, str | None]] = []
    for part in roles:
        section = experiment.student if part == "student" else experiment.teacher
        hub = configured_on_hub(run, section)
        licence = licence_of(section.model, hub.commit if hub else section.revision)
        rows.append((part, name_of(section.model, public), licence))
    if role == "student" and experiment.answerer is not None:
        rows.append(("answerer", f"{name_of(experiment.answerer.model, public)} (API)", None))
    return rows


def _licence_section(licences: list[tuple[str, str, str | None]], declared: str | None) -> str:
    rows = [(part, name, licence or "not known") for part, name, licence in licences]
    text = table(("role", "model", "licence"), rows)
    if declared is None:
        text += (
            "\nNo licence is declared here. Those of the trained model and of the models that wrote its training data may "
            "bind this one; set `license` in the header before you publish.\n"
        )
    return text


def _scores(metrics: dict[str, Any], role: Role) -> str:
    """Return held-out losses and benchmark scores: of a teacher, those of the student trained on its data."""
    losses = metrics.get("held_out_loss") or {}
    rows = [
        (f"held-out loss, nats per token: {name}", f"{loss['mean']:.4f}", f"{loss['standard_error']:.4f}")
        for name, loss in losses.items()
    ]
    for score in metrics.get("scores") or []:
        if score["model"] == "student" and score["mean"] is not None:
            error = "" if score["standard_error"] is None else f"{score['standard_error']:.2g}"
            rows.append((f"{task_name(score['benchmark'])}, {score['metric']}", f"{score['mean']:.4g}", error))
    if not rows:
        return ""
    note = (
        "Of students trained on this teacher's data, and of those they are compared with.\n\n"
        if role == "teacher"
        else ""
    )
    return note + table(("measure", "mean", "standard error"), rows)
