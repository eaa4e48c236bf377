"""Progress of a stage: a bar on the terminal, and the same in Prefect's UI."""

import sys
import time
from types import TracebackType

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from tqdm import tqdm

from cluster.fanout import Progress

_UI_PAUSE = 5.0  # seconds between updates of the artifact


class ProgressBar:
    """Shows the progress of one stage from `fan_out`; a stage that was done before shows as a full bar at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm | None = None  # type: ignore[type-arg]
        self._artifact: object = None
        self._published = 0.0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """Callback for `fan_out`."""
        if self._bar is None:
            self._bar = tqdm(
                total=progress.rows,
                desc=self._name,
                file=sys.stderr,
                mininterval=0.2 if sys.stderr.isatty() else 15.0,
                dynamic_ncols=True,
                bar_format="{desc:<46} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
        self._bar.set_postfix_str(f"shards {progress.shards_done}/{progress.shards}", refresh=False)
        self._bar.update(progress.rows_done - self._bar.n)
        self._publish(progress)

    def _publish(self, progress: Progress) -> None:
        ended = progress.rows_done == progress.rows
        if FlowRunContext.get() is None or (time.monotonic() - self._published < _UI_PAUSE and not ended):
            return
        self._published = time.monotonic()
        share = 100.0 * progress.rows_done / progress.rows if progress.rows else 100.0
        if self._artifact is None:
            self._artifact = create_progress_artifact(share, description=self._name)
        else:
            update_progress_artifact(self._artifact, share)  # type: ignore[arg-type]
