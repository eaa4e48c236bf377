"""Progress of a stage on the terminal."""

import sys
import time
from typing import Any

from tqdm import tqdm

from cluster.progress import Progress

_PAUSE, _LOG_PAUSE = 0.2, 15.0  # seconds between updates: terminal, log file


class ProgressBar:
    """Progress bar of one stage of `fan_out`. A stage that is already complete shows a full bar."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: _Bar | None = None
        self._pause = _PAUSE if sys.stderr.isatty() else _LOG_PAUSE
        self._drawn_at = 0.0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """Callback for `fan_out`."""
        if self._bar is None:
            self._bar, self._drawn_at = _Bar(progress, self._name), time.monotonic()
        self._bar.set(progress)
        if time.monotonic() - self._drawn_at >= self._pause:
            self._drawn_at = time.monotonic()
            self._bar.refresh()


class _Bar(tqdm):  # type: ignore[type-arg]
    """A tqdm bar that counts fractions of rows and takes the remaining time from the jobs.

    tqdm's own rate would include rows of earlier runs and the loading of models.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        super().__init__(
            total=progress.rows,
            initial=progress.rows_done,
            desc=name,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc:<46} {percent:3d}%|{bar:20}| {rows}/{total_fmt} [{elapsed}<{left}, shards {shards}]",
        )

    def set(self, progress: Progress) -> None:
        """Store the progress without drawing it."""
        self._progress, self.n = progress, progress.rows_done

    @property
    def format_dict(self) -> dict[str, Any]:
        """Add the fields of `bar_format` that tqdm does not define."""
        progress = self._progress
        remaining = "starting" if progress.seconds_left is None else tqdm.format_interval(progress.seconds_left)
        return {
            **super().format_dict,
            "rows": int(progress.rows_done),  # rounded down: 100 % only at the end
            "percent": int(100 * progress.rows_done / progress.rows) if progress.rows else 100,
            "left": remaining if progress.rows_done < progress.rows else tqdm.format_interval(0),
            "shards": f"{len(progress.done)}/{progress.shards}",
        }
