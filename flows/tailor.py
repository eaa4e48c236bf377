"""The flow behind the simple form: people name models, data, a size and machines; a preset has the other settings."""

import json
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from cluster.simulation import ClusterSpec, FailureModel
from flows.disk import warn_of_run
from flows.driver_job import check_driver_job
from flows.estimate import estimate_run
from flows.experiment import drive_run, end_jobs_of, run_root, start_run
from flows.forecast import forecast
from montessori_core.config import Experiment, Tailored
from montessori_core.export.markdown import table
from montessori_core.formatting import duration
from tasks.run import Run, reopen_run

_SIMULATIONS = 50


def end_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    """End the remaining jobs of a cancelled run (Prefect hook)."""
    end_jobs_of(Tailored.model_validate(flow_run.parameters["tailored"]).name, flow_run)


@flow(name="tailor", flow_run_name="{tailored.name}", on_cancellation=[end_jobs])
def tailor(tailored: Tailored, approve: bool = False, submit_driver: bool = False) -> None:
    """Tailor a teacher to your student and to the tasks of your reference set.

    The first artifact says what will happen, where, and for how long. A run of the same name is resumed.

    Args:
        tailored: models, data, size and machines. The Description of this deployment links to the forms with every setting
            that are deployed, too.
        approve: pause before every teacher update until a person approves the preference pairs. The run keeps this, also if
            it is resumed without it.
        submit_driver: run the driver as a Slurm job (slurm.driver in the file of the cluster) that this flow run waits for.
    """
    experiment = tailored.experiment()
    if submit_driver:
        check_driver_job(experiment.cluster, approve)
    pilot = reopen_run(run_root() / tailored.pilot) if tailored.pilot else None

    def start() -> Run:
        run = start_run(experiment)
        form = _find_form(tailored.preset, form_values(run.experiment, approve, submit_driver))
        plan = describe_plan(run, tailored.preset, pilot, form)
        create_markdown_artifact(plan, description=f"Plan of {tailored.name}")
        return run

    drive_run(experiment, start, approve, submit_driver)


def form_address(deployment: UUID, values: Mapping[str, Any] | None = None) -> str:
    """Return the address of a deployment's form, filled in with values of its parameters.

    It is relative to the page of a deployment, a flow run or an artifact: so it leads to the same interface of Prefect, the
    old one or the new one under /v2, through any tunnel or proxy.
    """
    address = f"../../deployments/deployment/{deployment}/run"
    if values is None:
        return address
    return f"{address}?parameters={quote(json.dumps(values), safe='')}"


def form_values(experiment: Experiment, approve: bool, submit_driver: bool) -> dict[str, Any]:
    """Return the parameters of the full form that has the same values; see `flows.experiment.montessori`."""
    values = experiment.model_dump(mode="json", exclude_unset=True)
    return {"experiment": values, "approve": approve, "submit_driver": submit_driver}


def _find_form(preset: str, values: Mapping[str, Any]) -> str | None:
    """Return the address of the form of a preset's deployment, filled in with values; None if it is not deployed."""
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"montessori/{preset}")
        except ObjectNotFound:
            return None
    return form_address(deployment.id, values)


def describe_plan(run: Run, preset: str, pilot: Run | None, form: str | None) -> str:
    """Return what a run will do, where and for how long, as Markdown.

    Args:
        run: not started.
        preset: has the settings that the simple form lacks.
        pilot: finished run, to forecast the time.
        form: address of the form with every setting.

    Raises:
        UserError: the pilot is not finished.
    """
    experiment, estimate = run.experiment, estimate_run(run)
    header, *rows = estimate.table()
    lines = [
        f"## {experiment.name}",
        f"`{experiment.teacher.model}` learns to write what helps `{experiment.student.model}` with tasks like those of "
        f"`{experiment.reference.path}`; the held-out loss is measured on `{experiment.evaluation.path}`.",
        "",
        table(header, rows),
        *(f"* {sentence}" for sentence in [*estimate.left_out(experiment), *warn_of_run(run)]),
    ]
    if estimate.seconds is not None:
        total = duration(estimate.seconds)
        lines += ["", f"**About {total}** on this machine, by its speed ({estimate.gflops:.0f} GFLOP/s)."]
    if pilot is not None:
        lines += ["", _forecast_of(pilot, experiment)]
    elif estimate.seconds is None:
        lines += ["", "The time is not known yet: run a pilot, and name it here as `pilot`."]
    return "\n".join(
        [
            *lines,
            "",
            "### Where",
            "",
            _describe_machines(experiment),
            "",
            f"Settings: `{run.folder / 'config.yaml'}`, the preset `{preset}` with your values."
            + (
                f" To change any of them, choose another name in [the form with every setting]({form})." if form else ""
            ),
        ]
    )


def _describe_machines(experiment: Experiment) -> str:
    """Return a table of the jobs of each stage."""
    cluster = experiment.cluster
    local = "this machine" if cluster.profile == "local" else "the allocation"
    rows = []
    for stage, needed in cluster.resources:
        if stage == "judging" and not experiment.asks_api:
            continue
        partition = cluster.slurm.of_stage(stage).partition or "the default partition"
        place = f"Slurm, {partition}" if cluster.profile == "slurm" else local
        rows.append((stage, needed.parallel_jobs, needed.nodes, needed.gpus_per_node, place))
    return table(("stage", "jobs at a time", "nodes", "GPUs of each", "where"), rows)


def _forecast_of(pilot: Run, experiment: Experiment) -> str:
    """Forecast the time on nodes that hold all jobs of the largest stage at a time, without failures or queues."""
    stages = [resources for _, resources in experiment.cluster.resources]
    gpus = max(needed.gpus_per_node for needed in stages)
    at_once = max(needed.parallel_jobs * needed.nodes * needed.gpus_per_node for needed in stages)
    nodes = max(math.ceil(at_once / gpus) if gpus else 1, *(needed.nodes for needed in stages))
    cores = max(needed.parallel_jobs * needed.processes_per_node * needed.cpus_per_process for needed in stages)
    (times,) = forecast(pilot, experiment, [ClusterSpec(nodes, gpus, cores)], FailureModel(), _SIMULATIONS)
    wall = [duration(3600 * times.hours("wall", share)) for share in (0.5, 0.1, 0.9)]
    return (
        f"**About {wall[0]}** ({wall[1]} to {wall[2]}) and {times.hours('gpu', 0.5):,.1f} GPU-hours on {nodes} node(s) with "
        f"{gpus} GPUs, without waiting in queues and without failures; forecast from the pilot `{pilot.experiment.name}`."
    )
