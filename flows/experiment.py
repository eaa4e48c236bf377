"""An experiment: iterations one after the other, each with the teacher and the student of the last."""

from prefect import flow

from flows.iteration import Iteration, iteration
from tasks.report import write_report
from tasks.run import Run, only_driver


@flow(flow_run_name="{run.experiment.name}", validate_parameters=False)
def experiment(run: Run) -> None:
    """Run, or resume, all iterations. Whatever is done already is read, not repeated."""
    with only_driver(run.folder):
        done: Iteration | None = None
        for number in range(1, run.experiment.iterations + 1):
            done = iteration(run, number, done)
            write_report(run)
