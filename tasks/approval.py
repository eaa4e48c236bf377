"""A pause before the teacher update, until a person has looked at the preference pairs."""

from pathlib import Path
from typing import Any

from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from montessori_core import layout
from montessori_core.data.tables import INFLUENCE, PREFERENCES, read_table
from montessori_core.errors import UserError
from montessori_core.files import hash_path, read_json, write_json
from montessori_core.influence.preferences import threshold_of
from montessori_core.influence.table import summarize_influence
from tasks.run import Run

_WEEK = 7 * 24 * 3600  # seconds


class Approval(RunInput):
    """What a person says to the preference pairs."""

    update_the_teacher: bool = Field(True, description="No ends the run here; what is done is kept.")


def approve_update(run: Run, number: int, influence: Path, preferences: Path) -> None:
    """Pause the flow run; pairs that were approved once are not asked about again.

    Raises:
        UserError: the update was not approved.
    """
    noted, pairs = run.iteration(number) / "approved.json", hash_path(preferences)
    if (read_json(noted) or {}).get("preferences") == pairs:
        return
    answer: Any = pause_flow_run(
        wait_for_input=Approval.with_initial_data(description=_summary(run, number, influence, preferences)),
        timeout=_WEEK,
        key=layout.iteration(number),
    )
    if not answer.update_the_teacher:
        raise UserError(
            f"iteration {number}: the teacher update was not approved. Start this run again to be asked once more, "
            "with other preferences if you like, or change influence under a new name"
        )
    write_json({"preferences": pairs}, noted)


def _summary(run: Run, number: int, influence: Path, preferences: Path) -> str:
    baseline = run.experiment.preferences.baseline
    table, pairs = read_table(influence, INFLUENCE), read_table(preferences, PREFERENCES, ["prompt_id"])
    lines = {
        "preference pairs": pairs.num_rows,
        "prompts they come from": len(set(pairs["prompt_id"].to_pylist())),
        **{
            name.replace("_", " "): value
            for name, value in summarize_influence(table, threshold_of(table, baseline)).items()
        },
    }
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in lines.items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    return (
        f"**{run.experiment.name}, iteration {number}**: update the teacher on these pairs? (baseline: {baseline})\n\n"
        f"| | |\n|---|---|\n{rows}\n\nTables: `{preferences}`, `{influence}`"
    )
