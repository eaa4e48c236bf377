"""Approval of preference pairs: a person reads them before they update the teacher.

A flow run started from Prefect requires it; the run then keeps the requirement, however it is resumed.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Literal
from uuid import UUID, uuid4

import httpx
import pyarrow as pa
from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput, read_flow_run_input
from prefect.input.run_input import keyset_from_base_key
from pydantic import Field, ValidationError

from cluster.backends.sbatch import DRIVER_JOB
from montessori_core import layout
from montessori_core.data.tables import INFLUENCE, PREFERENCES, read_table
from montessori_core.errors import UserError
from montessori_core.export.markdown import escape
from montessori_core.files import commit, hash_path, read_json, write_json
from montessori_core.influence.preferences import threshold_of
from montessori_core.influence.table import describe_influence, influence_warnings, summarize_influence
from tasks.resume import resume_command
from tasks.run import Run

WhenUnapproved = Literal["pause", "refuse"]
"""What a driver does with pairs that are not approved: pause until a person answers in Prefect, or end with an error."""
_WEEK = 7 * 24 * 3600  # seconds
_PAUSE = 10.0  # seconds between two looks for an answer
_PAIRS_SHOWN = 8
_WIDTH = 200  # characters of an instruction shown


class Approval(RunInput):
    """A person's decision about the preference pairs."""

    # Without a default, which Prefect would take for the answer to a question that nobody has answered.
    update_the_teacher: bool = Field(description="Off ends the run here. Finished stages are kept.")


def require_approval(run: Run) -> None:
    """Let every teacher update of a run need approval, also by drivers that resume it."""
    write_json({"required": True}, run.folder / layout.APPROVAL)


def needs_approval(run: Run) -> bool:
    """Return whether a flow run has required approval of this run's pairs."""
    return (run.folder / layout.APPROVAL).exists()


def approve_pairs(run: Run) -> Path:
    """Approve the pairs at which the run has stopped, the first that are not approved; return their file.

    Raises:
        UserError: no pairs wait for approval.
    """
    for number, folder in layout.iterations(run.folder).items() if needs_approval(run) else ():
        preferences = folder / layout.PREFERENCES
        if preferences.exists() and not _is_approved(run, number, preferences):
            _record(run, number, preferences)
            return preferences
    raise UserError(f"{run.folder}: no preference pairs wait for approval; resume the run without --approve-pairs")


def check_approval(run: Run, number: int, influence: Path, preferences: Path, when_unapproved: WhenUnapproved) -> None:
    """Return when these pairs are approved.

    Raises:
        UserError: they are not, or nobody answered.
    """
    if _is_approved(run, number, preferences):
        return
    summary = _summary(run, number, influence, preferences)
    if when_unapproved == "pause":
        _ask(number, summary)
        _record(run, number, preferences)
        return
    with commit(page := run.iteration(number) / "approval.md") as temporary:
        temporary.write_text(summary, encoding="utf-8")
    options = " --approve-pairs" + (" --submit-driver" if DRIVER_JOB in os.environ else "")
    raise UserError(
        f"iteration {number}: this run needs approval of its preference pairs, and nobody has approved them. Read {page}; to "
        f"approve them: {resume_command(run.folder, options)}. Or start the run from Prefect again, which asks there"
    )


def _is_approved(run: Run, number: int, preferences: Path) -> bool:
    approved = read_json(_record_of(run, number)) or {}
    return bool(approved.get("preferences") == hash_path(preferences))


def _record(run: Run, number: int, preferences: Path) -> None:
    write_json({"preferences": hash_path(preferences)}, _record_of(run, number))


def _record_of(run: Run, number: int) -> Path:
    return run.iteration(number) / "approved.json"


def _ask(number: int, summary: str) -> None:
    """Pause the flow run until a person answers in Prefect.

    Raises:
        UserError: the answer is no, or nobody answered.
    """
    question = Approval.with_initial_data(description=summary)
    answer: Approval | None = None
    try:
        while answer is None:
            with suppress(ValidationError):  # the run is resumed without an answer: ask again
                # Prefect does not pause twice for a key, and a driver that was killed may have asked before.
                answer = _answer_to(question, f"{layout.iteration(number)}-{uuid4()}")
    except FlowPauseTimeout as error:
        raise UserError(
            f"iteration {number}: nobody has approved or refused the teacher update within a week. Retry this run to be "
            "asked again"
        ) from error
    if not answer.update_the_teacher:
        raise UserError(
            f"iteration {number}: the teacher update was not approved. Retry this run to be asked again, or start it again "
            "with other settings in preferences or influence"
        )


def _answer_to(question: type[Approval], key: str) -> Approval:
    """Pause the flow run for a question until it is answered, also while the server is away.

    Raises:
        FlowPauseTimeout: nobody answered.
        ValidationError: the run is resumed without an answer.
    """
    deadline = time.monotonic() + _WEEK
    try:
        return pause_flow_run(wait_for_input=question, timeout=_WEEK, key=key)
    except httpx.HTTPError as error:
        _raise_unless_passing(error)
        get_run_logger().warning("the Prefect server does not answer (%r); waiting for it", error)
    flow_run, keys = UUID(runtime.flow_run.id), keyset_from_base_key(f"paused-{key}")
    while time.monotonic() < deadline:
        time.sleep(_PAUSE)
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(flow_run).state
            if state is not None and state.is_running():
                return question.model_validate(read_flow_run_input(keys["response"], flow_run) or {})
        except httpx.HTTPError as error:
            _raise_unless_passing(error)
    raise FlowPauseTimeout("Flow run was paused and never resumed.")


def _raise_unless_passing(error: httpx.HTTPError) -> None:
    """Raise an error of Prefect's client, unless the server or its database is away."""
    refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
    if refused or not isinstance(error, httpx.TransportError | httpx.HTTPStatusError):
        raise error


def _summary(run: Run, number: int, influence: Path, preferences: Path) -> str:
    baseline = run.experiment.preferences.baseline
    table, pairs = read_table(influence, INFLUENCE), read_table(preferences, PREFERENCES, ["chosen", "rejected"])
    summary = summarize_influence(table, threshold_of(table, baseline))
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
        *(f"\n**Warning**: {escape(warning)}" for warning in influence_warnings(summary)),
        f"\nAll pairs and their influence: {escape(preferences)}, {escape(influence)}",
    ]
    return "\n".join(lines)


def _text(output: pa.StringScalar) -> str:
    return escape(shorten(output.as_py(), _WIDTH, placeholder=" [...]"))
