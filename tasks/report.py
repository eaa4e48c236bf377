"""The report of a run."""

import os
from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core import layout
from montessori_report.run_page import render_report
from tasks.run import Run

REPORTS = "MONTESSORI_REPORTS"
"""Environment variable: base URL of served reports, as in <URL>/<run>/report.html."""


@task(task_run_name="report", cache_policy=NO_CACHE)
def write_report(run: Run) -> Path:
    """Write `report.html` and the data of its figures into the run's folder."""
    path = run.folder / layout.REPORT
    render_report(run.folder).write(path)
    base_url = os.environ.get(REPORTS)
    link = f"{base_url}/{run.folder.name}/{layout.REPORT}" if base_url else path.as_uri()
    create_link_artifact(link, link_text="report.html", description=f"Report of {run.experiment.name}: {path}")
    return path
