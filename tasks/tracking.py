"""Report a run to the trackers of `tracking`: the driver's part."""

import logging
from collections.abc import Mapping
from pathlib import Path

from montessori_core import layout
from montessori_core.config import Experiment
from montessori_core.files import read_json
from montessori_core.tracking.numbers import log_numbers, numbers_of
from montessori_core.tracking.runs import forget_problems, new_problems, prepare_tracking

log = logging.getLogger(__name__)


def tracking_input(folder: Path, experiment: Experiment) -> dict[str, Path]:
    """Return the file of the trackers as an input of trainings, which does not enter their keys; none without trackers."""
    if not experiment.tracking:
        return {}
    return {"tracking": prepare_tracking(folder, experiment.name, experiment.tracking)}


def start_tracking(folder: Path, experiment: Experiment) -> None:
    """Prepare the tracking of a run; each problem is shown once by each driver."""
    for file in tracking_input(folder, experiment).values():
        forget_problems(file)


def track_iteration(folder: Path, experiment: Experiment, number: int) -> None:
    """Log the numbers of a finished iteration: seconds, funnel, influence, losses, gains and scores."""
    metrics = read_json(folder / layout.iteration(number) / layout.METRICS)
    for file in tracking_input(folder, experiment).values():
        log_numbers(file, numbers_of(metrics), number)
    show_problems(folder, experiment)


def track_method(folder: Path, experiment: Experiment, name: str, numbers: Mapping[str, float]) -> None:
    """Log the numbers of a method of a study, such as its student's held-out loss."""
    for file in tracking_input(folder, experiment).values():
        log_numbers(file, {f"methods/{name}/{key}": value for key, value in numbers.items()}, 1)
    show_problems(folder, experiment)


def show_problems(folder: Path, experiment: Experiment) -> None:
    """Warn of trackers that failed, once for each."""
    for file in tracking_input(folder, experiment).values():
        for tracker, problem in new_problems(file).items():
            log.warning("tracking: %s: %s. The run continues; see docs/tracking.md", tracker, problem)
