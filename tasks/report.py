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
"""Environment variable: address under which reports are served, as <address>/<run>/report.html."""


@task(task_run_name="report", cache_policy=NO_CACHE)
def write_report(run: Run) -> Path:
    """Write `report.html` from what lies in the run's folder, and the data of its figures beside it."""
    path = run.folder / layout.REPORT
    render_report(run.folder).write(path)
    served = os.environ.get(REPORTS)
    link = f"{served}/{run.folder.name}/{layout.REPORT}" if served else path.as_uri()
    create_link_artifact(link, link_text="report.html", description=f"Report of {run.experiment.name}: {path}")
    return path
