"""Have Slurm check the options of each stage's jobs without a submission (`sbatch --test-only`)."""

import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from cluster.backends.base import SchedulerUnavailable
from cluster.backends.sbatch import options_of, refusal_of
from cluster.backends.slurm import SlurmBackend
from montessori_core.config import Cluster
from montessori_core.errors import UserError

_NAME = "montessori-check"
# Of every script, whatever the configuration says.
_SAME_IN_EACH_SCRIPT = ("--job-name", "--output", "--error", "--open-mode", "--signal", "--parsable")
# Parts of refusals that time does not change. Other jobs would wait in the queue: their nodes may be down, which
# --test-only does not tell from nodes that do not exist.
_PERMANENT = ("nvalid", "not permitted", "nrecognized")


def scripts_of(cluster: Cluster) -> dict[str, list[str]]:
    """Return the different batch scripts of the stages' jobs, each with the names of its stages."""
    scripts: dict[str, list[str]] = {}
    for stage, resources in cluster.resources:
        backend = SlurmBackend(cluster.slurm.of_stage(stage), resources, None)
        scripts.setdefault(backend.script(_NAME, Path()), []).append(stage)
    return scripts


def check_script(text: str) -> tuple[str, str | None]:
    """Return the options of a batch script in one line, and why Slurm refuses it; None if it does not.

    Raises:
        SchedulerUnavailable: sbatch does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.sh"
        script.write_text(text, encoding="utf-8")
        options = [option for option in options_of(script) if not option.startswith(_SAME_IN_EACH_SCRIPT)]
        return " ".join(options), refusal_of(script)


def check_jobs(cluster: Cluster, unused: Collection[str] = ()) -> list[str]:
    """Have Slurm check the jobs of each stage, before early stages compute for hours; return passing refusals as warnings.

    If sbatch does not answer, nothing is checked: the driver will wait for it.

    Args:
        cluster: configuration.
        unused: stages without jobs.

    Raises:
        UserError: Slurm never accepts some jobs, such as those of an unknown partition; names stages and settings.
    """
    permanent: list[str] = []
    passing: list[str] = []
    with suppress(SchedulerUnavailable):
        for text, sharing in scripts_of(cluster).items():
            stages = [stage for stage in sharing if stage not in unused]
            options, refusal = check_script(text) if stages else ("", None)
            if refusal is None:
                continue
            fields = [f"slurm.stages.{stage}" for stage in stages if stage in cluster.slurm.stages]
            fields += [f"resources.{stage}" for stage in stages]
            refusals = permanent if any(part in refusal for part in _PERMANENT) else passing
            refusals.append(
                f"Slurm refuses the jobs of {', '.join(stages)} ({options}): {refusal}\nChange cluster.slurm or, for these "
                f"stages, {', '.join(fields)} under cluster; montessori doctor --cluster FILE checks the whole file"
            )
    if permanent:
        raise UserError("\n".join(permanent))
    return passing
