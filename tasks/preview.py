"""A preview of a run: one small round of synthesis with the run's own teacher, prompts, settings and filters.

It computes in a folder of its own, which is removed afterwards: a run cuts its rounds by the number of examples it needs, so
that it could not reuse the preview's stages, and a folder left behind could be taken for a run. Prompts and random numbers
are those with which the run's probing set begins, so a preview shows its first examples, up to the last bits of arithmetic.
"""

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.fanout import ShardsFailed, fan_out
from cluster.lock import driver_of, only_driver, refuse_other_owner
from cluster.shards import Shards
from cluster.stage import Stage
from cluster.status import cancel_jobs, stages_of
from cluster.usage import StageCost, cost_of
from montessori_core.config import Cluster, Experiment, Resources
from montessori_core.errors import UserError
from montessori_core.program import Row
from montessori_core.seeding import seed_of
from montessori_core.synthesis.prompts import Prompt
from tasks.candidates import write_round
from tasks.progress import ProgressBar
from tasks.run import Run, open_run
from tasks.stage import Step
from tasks.synthesis import open_authors

log = logging.getLogger(__name__)

_DRAW = "i1-probing"  # of the first iteration's probing set, see flows.methods.tailoring
_PREFIX = ".preview-"
_RUN = "run"  # in the preview's folder
_ABANDONED = 3600.0  # seconds after which a folder without a process is removed


@dataclass(frozen=True)
class PreviewStep(Step):
    """A step outside a flow: progress bars, but neither task runs nor artifacts."""

    def _watch(
        self,
        stage: Stage,
        shards: Shards,
        resources: Resources,
        python: str | None,
        bar: ProgressBar,
        inputs: Sequence[object],
        read: Callable[[Path], Any],
    ) -> list[Any]:
        return [read(part) for part in fan_out(stage, shards, resources, self.experiment.cluster, bar.show, python)]


@dataclass(frozen=True)
class Preview:
    """What a preview wrote.

    Attributes:
        prompts: of the teacher, by the ids that candidates have.
        candidates, examples: see `tasks.candidates.Round`.
        costs: of the stages whose jobs ran.
        seconds: of the whole round, with starting jobs and loading models.
    """

    prompts: dict[str, Prompt]
    candidates: list[Row]
    examples: list[Row]
    costs: list[StageCost]
    seconds: float

    @property
    def seconds_per_example(self) -> float | None:
        """Seconds that one job needs for an example, rejected candidates included; None if none was kept."""
        if not self.examples:
            return None
        total = sum(cost.seconds_per_row * cost.rows for cost in self.costs)
        return total / len(self.examples)


@contextmanager
def preview_run(experiment: Experiment, root: Path) -> Iterator[tuple[Run, list[str]]]:
    """Open a run in a temporary folder of `root`, which nodes of a cluster see, with all checks of a run.

    Yields the run and its warnings. The folder is removed at the end, unless a job failed, whose log it has. The next preview
    ends the jobs of previews that were killed, and removes folders that are older than an hour and have no process.

    Raises:
        UserError: a check failed, or the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _end_abandoned(root, experiment.cluster)
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{experiment.name}-", dir=root))
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror}); choose another --run-root") from error
    try:
        with only_driver(folder):
            yield open_run(experiment, folder / _RUN)
    except ShardsFailed:
        raise  # its message names a log in the folder, which a later preview removes
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _end_abandoned(root: Path, cluster: Cluster) -> None:
    """End the jobs of killed previews; remove the folders of previews that ended long ago."""
    for folder in root.glob(f"{_PREFIX}*"):
        if not folder.is_dir() or folder.is_symlink():
            continue
        try:
            if driver_of(folder) is not None:
                continue
            refuse_other_owner(folder / _RUN)
            cancel_jobs(folder, cluster)
        except (UserError, OSError) as error:  # the latter: another preview removes it, or its lock cannot be read
            log.warning("%s is left: %s", folder, error)
            continue
        if time.time() - folder.stat().st_mtime > _ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)


def write_preview(run: Run, count: int) -> Preview:
    """Let the initial teacher write about `count` examples: one round, whatever the filters leave of it.

    Raises:
        UserError: a job failed.
    """
    started = time.monotonic()
    experiment, settings = run.experiment, run.experiment.synthesis
    step, teacher = PreviewStep(run, run.folder / "preview", "preview"), run.initial_teacher()
    authors = open_authors(step, teacher, None, run.sources().seed_pool, [], [], _DRAW)
    wanted = math.ceil(count * settings.oversampling / settings.samples_per_prompt)
    prompts = authors.strategy.prompts(wanted, seed_of(experiment.seed, _DRAW))
    written = write_round(step, 1, prompts, count, authors, [])
    return Preview(
        {f"{_DRAW}-{prompt.id}": prompt for prompt in prompts},
        written.candidates,
        written.examples,
        [cost for folder in stages_of(step.folder) if (cost := cost_of(folder)) is not None],
        time.monotonic() - started,
    )
