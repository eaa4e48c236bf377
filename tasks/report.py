"""The report of a run."""

from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core.atomic import commit
from montessori_core.report.render import render_report
from tasks.run import Run


@task(task_run_name="report", cache_policy=NO_CACHE)
def write_report(run: Run) -> Path:
    """Write `report.html` from what lies in the run's folder."""
    path = run.folder / "report.html"
    with commit(path) as temporary:
        temporary.write_text(render_report(run.folder), encoding="utf-8")
    create_link_artifact(path.as_uri(), link_text="report.html", description=f"Report of {run.experiment.name}")
    return path
