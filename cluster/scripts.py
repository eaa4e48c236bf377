"""Have Slurm check the options of each stage's jobs without a submission (`sbatch --test-only`)."""

import logging
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from cluster.backends.base import SchedulerUnavailable
from cluster.backends.sbatch import check_script, options_of
from cluster.backends.slurm import SlurmBackend
from montessori_core.config import Cluster
from montessori_core.errors import UserError

log = logging.getLogger(__name__)

_NAME = "montessori-check"
# Of every script, whatever the configuration says.
_SAME_IN_EACH_SCRIPT = ("--job-name", "--output", "--error", "--open-mode", "--signal", "--parsable")
# Lines of sbatch itself, not of the site, with these parts: refusals that time does not change. Other jobs would wait in the
# queue: their nodes may be down, which --test-only does not tell from nodes that do not exist.
_OF_SBATCH = ("allocation failure:", "sbatch: error:", "sbatch: unrecognized", "sbatch: invalid")
_PERMANENT = ("nvalid", "not permitted", "nrecognized")
_accepted: set[str] = set()
"""Scripts that Slurm has accepted: the runs of a study have the same."""


def scripts_of(cluster: Cluster) -> dict[str, list[str]]:
    """Return the different batch scripts of the stages' jobs, each with the names of its stages."""
    scripts: dict[str, list[str]] = {}
    for stage, resources in cluster.resources:
        backend = SlurmBackend(cluster.slurm.of_stage(stage), resources, None)
        scripts.setdefault(backend.script(_NAME, Path()), []).append(stage)
    return scripts


def options_in(text: str) -> str:
    """Return the options of a batch script in one line."""
    return " ".join(option for option in options_of(text) if not option.startswith(_SAME_IN_EACH_SCRIPT))


def check_jobs(cluster: Cluster, unused: Collection[str] = ()) -> list[str]:
    """Have Slurm check the jobs of each stage, before early stages compute for hours; return what may pass as warnings.

    If sbatch or the controller does not answer, nothing is checked: the driver will wait for it. Nor if sbatch does not know
    --test-only, as emulations of it.

    Args:
        cluster: configuration.
        unused: stages without jobs.

    Raises:
        UserError: Slurm never accepts some jobs, such as those of an unknown partition; names stages and settings.
    """
    scripts = {
        text: stages
        for text, sharing in scripts_of(cluster).items()
        if (stages := [stage for stage in sharing if stage not in unused]) and text not in _accepted
    }
    if scripts:
        log.info("asking Slurm whether it would accept the jobs (sbatch --test-only)")
    permanent: list[str] = []
    temporary: list[str] = []
    with suppress(SchedulerUnavailable):
        for text, stages in scripts.items():
            refusal = check_script(text)
            if refusal is None:
                _accepted.add(text)
                continue
            if "test-only" in refusal:
                break
            fields = [f"slurm.stages.{stage}" for stage in stages if stage in cluster.slurm.stages]
            fields += [f"resources.{stage}" for stage in stages]
            lines = [line for line in refusal.split("; ") if line.startswith(_OF_SBATCH)]
            refusals = permanent if any(part in line for line in lines for part in _PERMANENT) else temporary
            refusals.append(
                f"Slurm refuses the jobs of {', '.join(stages)} ({options_in(text)}): {refusal}\nChange cluster.slurm or, "
                f"for these stages, {', '.join(fields)} under cluster; montessori doctor --cluster FILE checks the whole file"
            )
    if permanent:
        raise UserError("\n".join(permanent))
    return temporary
