"""Gather the content of a pushed run but its report: its tables, its last models, and a data card."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from montessori_core import layout
from montessori_core.data.cards import CARD
from montessori_core.errors import DataError
from montessori_core.export.card import model_path, run_card, set_file
from montessori_core.export.formats import FORMATS
from montessori_core.export.model_card import write_card
from montessori_core.export.models import ROLES, UNPUBLISHED, model_card, model_folder
from montessori_core.export.sets import SETS, RunSet, open_set
from montessori_core.export.write import write_rows
from montessori_core.models.adapters import is_adapter


def finished_sets(run: Path) -> list[RunSet]:
    """Return the data sets of a run's finished iterations.

    Raises:
        DataError: the folder is no run, or no iteration is finished.
    """
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


def gather(sets: Sequence[RunSet], folder: Path, with_models: bool = True) -> None:
    """Fill an empty folder with what is pushed of a run but its report; the files of models are symbolic links.

    Args:
        sets: see `finished_sets`.
        folder: the folder.
        with_models: push the student and the teacher of the last finished iteration too.

    Raises:
        DataError: a table is damaged.
    """
    form, last = FORMATS["parquet"], sets[-1]
    run = last.run.resolve()
    written = []
    for data in sets:
        path = folder / set_file(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        written.append((data, write_rows(data, form, path).rows))
    models: dict[str, int] = {}
    for role in ROLES if with_models else ():
        try:
            trained, number = model_folder(run, role, last.iteration)
        except DataError:  # not every method trains a teacher
            continue
        models[role] = number
        target = folder / model_path(role)
        shutil.copytree(trained, target, ignore=UNPUBLISHED, copy_function=os.symlink)
        card = model_card(run, role, number, adapter=is_adapter(trained))
        write_card(card, target)
    (folder / CARD).write_text(run_card(written, models, form), encoding="utf-8")
