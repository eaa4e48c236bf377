"""Pause a run before the teacher update until a person approves the preference pairs."""

from pathlib import Path
from textwrap import shorten
from typing import Any

import pyarrow as pa
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from montessori_core import layout
from montessori_core.data.tables import INFLUENCE, PREFERENCES, read_table
from montessori_core.errors import UserError
from montessori_core.export.markdown import escape
from montessori_core.files import hash_path, read_json, write_json
from montessori_core.influence.preferences import threshold_of
from montessori_core.influence.table import describe_influence, domination_warning, summarize_influence
from tasks.run import Run

_WEEK = 7 * 24 * 3600  # seconds
_PAIRS_SHOWN = 8
_WIDTH = 200  # characters of an instruction shown


class Approval(RunInput):
    """A person's decision about the preference pairs."""

    update_the_teacher: bool = Field(True, description="Choose no to end the run here. Finished stages are kept.")


def approve_update(run: Run, number: int, influence: Path, preferences: Path) -> None:
    """Pause the flow run until these pairs are approved; return at once if they already are.

    Raises:
        UserError: the update was not approved, or nobody answered.
    """
    record, pairs = run.iteration(number) / "approved.json", hash_path(preferences)
    if (read_json(record) or {}).get("preferences") == pairs:
        return
    summary = _summary(run, number, influence, preferences)
    try:
        answer: Any = pause_flow_run(
            wait_for_input=Approval.with_initial_data(description=summary), timeout=_WEEK, key=layout.iteration(number)
        )
    except FlowPauseTimeout as error:
        raise UserError(
            f"iteration {number}: nobody has approved or refused the teacher update within a week. Retry this run to be "
            "asked again"
        ) from error
    if not answer.update_the_teacher:
        raise UserError(
            f"iteration {number}: the teacher update was not approved. Start this run again to be asked again, "
            "with other settings in preferences if needed; to change influence, use a new run name"
        )
    write_json({"preferences": pairs}, record)


def _summary(run: Run, number: int, influence: Path, preferences: Path) -> str:
    baseline = run.experiment.preferences.baseline
    table, pairs = read_table(influence, INFLUENCE), read_table(preferences, PREFERENCES, ["chosen", "rejected"])
    summary = summarize_influence(table, threshold_of(table, baseline))
    warning = domination_warning(summary)
    shown = range(0, pairs.num_rows, max(1, -(-pairs.num_rows // _PAIRS_SHOWN)))
    lines = [  # not tables, which do not wrap in this dialogue
        f"**{escape(run.experiment.name)}, iteration {number}**: update the teacher on these pairs?\n",
        f"{len(shown)} of the {pairs.num_rows} pairs, as the teacher wrote them:\n",
        *(
            f"* **chosen**: {_text(pairs['chosen'][row])}  \n  **rejected**: {_text(pairs['rejected'][row])}"
            for row in shown
        ),
        "\nInfluence:\n",
        *(f"* {name}: {value}" for name, value in describe_influence(summary, baseline)),
        f"\n**Warning**: {escape(warning)}" if warning else "",
        f"\nAll pairs and their influence: {escape(preferences)}, {escape(influence)}",
    ]
    return "\n".join(lines)


def _text(output: pa.StringScalar) -> str:
    return escape(shorten(output.as_py(), _WIDTH, placeholder=" [...]"))
