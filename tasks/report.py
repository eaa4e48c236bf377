"""The report of a run, and links to pages."""

import os
from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from montessori_core import layout
from montessori_report.run_page import render_report
from tasks.run import Run

REPORTS = "MONTESSORI_REPORTS"
"""Environment variable: base URL of served pages, as in <URL>/<run>/report.html."""


@task(task_run_name="report", cache_policy=NO_CACHE)
def write_report(run: Run) -> Path:
    """Write `report.html` and the data of its figures into the run's folder."""
    path = run.folder / layout.REPORT
    render_report(run.folder).write(path)
    link_page(path, f"Report of {run.experiment.name}")
    return path


def link_page(page: Path, title: str) -> None:
    """Create an artifact that links to a page in the folder of a run or a study."""
    base_url = os.environ.get(REPORTS)
    link = f"{base_url}/{page.parent.name}/{page.name}" if base_url else page.absolute().as_uri()
    create_link_artifact(link, link_text=page.name, description=f"{title}: {page}")
