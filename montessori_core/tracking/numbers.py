"""Log the numbers of iterations to the trackers, each once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from montessori_core.data.contamination import TRAINING_SET
from montessori_core.formatting import is_finite, task_name
from montessori_core.program import Row
from montessori_core.tracking.runs import ITERATIONS, TrackedRun, record_problem
from montessori_core.tracking.trackers import open_tracker


def log_numbers(file: Path, numbers: Mapping[str, float], step: int) -> None:
    """Log numbers to all trackers of a run. A number that is logged already is not logged again.

    A tracker that fails is recorded as a problem; its numbers are logged the next time.

    Args:
        file: the run's `tracking.json`.
        numbers: by name.
        step: the iteration.
    """
    run = TrackedRun.of(file, ITERATIONS)
    for tracker in run.trackers:
        logged = run.read_state(tracker).get("logged", {})
        new = {name: value for name, value in numbers.items() if logged.get(f"{name}@{step}") != value}
        if not new:
            continue
        try:
            try:
                with closing(open_tracker(tracker, run)) as opened:
                    # Before they are sent: after a kill in between, nothing is there twice.
                    run.update_state(tracker, logged=logged | {f"{name}@{step}": value for name, value in new.items()})
                    opened.log(new, step)
            except Exception:  # also of closing, when some trackers send
                run.update_state(tracker, logged=logged)
                raise
        except Exception as error:  # of any kind: a tracker never ends a run
            record_problem(file, tracker, error)


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an iteration's `metrics.json` for trackers, by name; those that are not finite are left out."""
    return {name: float(value) for name, value in _numbers(metrics) if is_finite(value)}


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    prefix = f"iteration-{metrics['iteration']}/"
    for stage in metrics.get("stages", []):  # older versions have fewer sections
        # Stages of the whole run are among those of each iteration.
        if stage["stage"].startswith(prefix) or metrics["iteration"] == 1:
            yield f"seconds/{stage['stage'].removeprefix(prefix)}", stage["seconds"]
    for section in ("synthesis", "influence"):
        for name, values in metrics.get(section, {}).items():
            yield from ((f"{section}/{name}/{key}", value) for key, value in values.items())
    yield from ((f"preferences/{name}", value) for name, value in metrics.get("preferences", {}).items())
    for section in ("held_out_loss", "held_out_gain"):
        yield from ((f"{section}/{name}", summary["mean"]) for name, summary in metrics.get(section, {}).items())
    yield from _scores(metrics.get("scores", []))
    for row in metrics.get("contamination", []):
        if row["data"] == TRAINING_SET:
            yield f"contamination/{task_name(row['benchmark'])}/{row['n']}_words", row["overlapping"]


def _scores(scores: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    for score in scores:
        yield f"scores/{score['model']}/{task_name(score['benchmark'])}/{score['metric']}", score["mean"]
