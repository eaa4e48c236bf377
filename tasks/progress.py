"""Progress of a stage on the terminal."""

import sys
from types import TracebackType

from tqdm import tqdm

from cluster.fanout import Progress


class ProgressBar:
    """Shows the progress of one stage from `fan_out`; a stage that was done before shows as a full bar at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm | None = None  # type: ignore[type-arg]

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
                initial=progress.rows_done,
                smoothing=0,  # rows come by the batch: the pace of the last moments is none
                desc=self._name,
                file=sys.stderr,
                mininterval=0.2 if sys.stderr.isatty() else 15.0,
                dynamic_ncols=True,
                bar_format="{desc:<46} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
        self._bar.set_postfix_str(f"shards {len(progress.done)}/{progress.shards}", refresh=False)
        self._bar.update(progress.rows_done - self._bar.n)
