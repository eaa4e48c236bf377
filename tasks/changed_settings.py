"""Settings that a run may change after it began, and the first stage that each decides."""

from pathlib import Path

from montessori_core.config import Experiment, differences, read_experiment
from montessori_core.errors import UserError

_FIRST_STAGES = {
    "preferences.": "preference pairs",
    "teacher_update.": "teacher update",
    "training.examples:": "training set",
    "training.": "student training",
}
"""Settings that a run may change, with the first stage that each decides, in the order of the stages."""


def changed_settings(experiment: Experiment, config: Path) -> list[str]:
    """Return the settings in which an experiment differs from a run's, one `path: before -> after` line each.

    Raises:
        UserError: what was computed before the preference pairs depends on one of them.
    """
    before = read_experiment(config)
    then, now = before.method(), experiment.method()
    if before.judge is None:
        then["judge"] = now["judge"]  # nothing was judged so far
    changed = differences(then, now)
    fixed = [line for line in changed if not line.startswith(tuple(_FIRST_STAGES))]
    if fixed:
        raise UserError(
            f"{config.parent}: this run was started with another configuration:\n  "
            + "\n  ".join(fixed)
            + "\nOnly preferences, teacher_update and training may change. Give the new configuration another --name, or "
            + f"resume the run as it was: montessori resume {config.parent}"
        )
    return changed


def first_stage(changed: list[str], experiment: Experiment) -> str:
    """Return the first stage whose key, or table, depends on the changed settings, for people."""
    if any(line.startswith("preferences.baseline:") for line in changed):
        # Exact measurements are made for its threshold.
        if experiment.influence.sequential is not None:
            return "influence of the probing set"
        if experiment.influence.estimator == "screened":
            return "confirmation of influence near the threshold"
    return next(stage for setting, stage in _FIRST_STAGES.items() if any(line.startswith(setting) for line in changed))
