"""Gather the content of a pushed run but its report: its tables, its last models, and a data card."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from montessori_core import layout
from montessori_core.data.cards import CARD
from montessori_core.errors import DataError, UserError
from montessori_core.export.card import model_path, run_card, set_file
from montessori_core.export.formats import FORMATS
from montessori_core.export.hub_models import HubModel, base_on_hub
from montessori_core.export.model_card import write_card
from montessori_core.export.models import ROLES, UNPUBLISHED, Role, model_card, model_folder, write_merged
from montessori_core.export.sets import SETS, RunSet, check_run, open_set
from montessori_core.export.write import write_rows
from montessori_core.files import read_json, write_json
from montessori_core.models.adapters import is_adapter
from montessori_core.models.fingerprints import ADAPTER


def finished_sets(run: Path) -> list[RunSet]:
    """Return the data sets of a run's finished iterations.

    Raises:
        DataError: the folder is no run, or no iteration is finished.
    """
    check_run(run)
    present = []
    for number, folder in layout.iterations(run).items():
        if not (folder / layout.METRICS).exists():
            continue
        for name in SETS:
            try:
                present.append(open_set(run, name, number))
            except DataError:
                if name == "training":
                    raise
    if not present:
        raise DataError(f"{run}: no finished iteration; resume the run first")
    return present


def gather(sets: Sequence[RunSet], folder: Path, with_models: bool = True, merge: bool = False) -> None:
    """Fill an empty folder with what is pushed of a run but its report; the files of models are symbolic links.

    Args:
        sets: see `finished_sets`.
        folder: the folder.
        with_models: push the student and the teacher of the last finished iteration too.
        merge: merge adapters into their base models, in float32.

    Raises:
        DataError: a table is damaged.
        UserError: a model is an adapter of a model that is not on a hub, and is not to be merged.
    """
    form, last = FORMATS["parquet"], sets[-1]
    models = _gather_models(last, folder, merge) if with_models else {}
    written = []
    for data in sets:
        path = folder / set_file(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        written.append((data, write_rows(data, form, path).rows))
    (folder / CARD).write_text(run_card(written, models, form), encoding="utf-8")


def _gather_models(last: RunSet, folder: Path, merge: bool) -> dict[str, int]:
    """Add the models of the last finished iteration to a folder; return the iteration of each, by role."""
    run = last.run.resolve()
    models: dict[str, int] = {}
    for role in ROLES:
        try:
            trained, number = model_folder(run, role, last.iteration)
        except DataError:  # not every method trains a teacher
            continue
        models[role] = number
        target = folder / model_path(role)
        adapter = is_adapter(trained)
        if adapter and merge:
            target.mkdir(parents=True)
            write_merged(trained, target)
        else:
            shutil.copytree(trained, target, ignore=UNPUBLISHED, copy_function=os.symlink)
            if adapter:
                _name_base(target, base_on_hub(trained, run, getattr(last.experiment, role)), role)
        write_card(model_card(run, role, number, adapter=adapter and not merge), target)
    return models


def _name_base(folder: Path, base: HubModel | None, role: Role) -> None:
    """Write the hub's id of an adapter's base model into the settings in a folder, in place of a path of this machine.

    Raises:
        UserError: the base model is not on a hub.
    """
    if base is None:
        raise UserError(
            f"the {role} is an adapter of a model that is not on a hub, so nobody else could load it; merge adapters into "
            "their base models with --merge, or leave the models out with --no-models"
        )
    file = folder / ADAPTER
    settings = read_json(file) | {"base_model_name_or_path": base.id, "revision": base.commit}
    file.unlink()  # a link to the run's file
    write_json(settings, file)
