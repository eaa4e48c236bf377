"""A stage in Prefect's UI: one task run for each chunk of its shards, with counts, failures and logs.

The fan-out has one driver. The chunks' task runs do no work; they end when the driver says that their shards have ended, so
that thousands of shards show as a few dozen task runs. What is done is for the disk to say: task runs are never cached.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.exceptions import PrefectException
from prefect.futures import PrefectFuture, wait

from cluster.fanout import Progress, ShardFailure, ShardsFailed
from cluster.stage import Stage
from cluster.status import logs_of
from montessori_core.errors import UserError

log = logging.getLogger(__name__)

SHARD_FAILED = "montessori.shard.failed"
"""Event for each shard that failed in the end; its resource is the stage."""
_UI_PAUSE = 5.0  # seconds between updates of the progress artifact
_FEWEST_SHARDS, _MOST_CHUNKS = 25, 20  # Prefect's graph is readable up to about 200 task runs
_LINES_AT_A_TIME = 100  # of a log that is passed on
_LOG_PAUSE = 1.0  # seconds between looks at logs
_FAILURES_SHOWN = 100
_PATIENCE = 20.0  # seconds for task runs to be recorded once their stage has ended


class StageTaskRuns:
    """Shows a stage from `fan_out` in the flow run at work."""

    def __init__(
        self, name: str, stage: Stage, shards: int, inputs: Sequence[object], read: Callable[[Path], Any]
    ) -> None:
        """Cut the stage into chunks.

        Args:
            name: for people.
            stage: what is shown.
            shards: how many it has.
            inputs: what earlier tasks returned and this stage reads; the edges of the graph follow from it.
            read: what a part that is done becomes for the tasks that read it.
        """
        size = max(_FEWEST_SHARDS, -(-shards // _MOST_CHUNKS))
        cut = [range(start, min(start + size, shards)) for start in range(0, shards, size)]
        names = [f"{name} {number}/{len(cut)}" if len(cut) > 1 else name for number in range(1, len(cut) + 1)]
        self._name, self._inputs = name, list(inputs)
        whole = len(cut) == 1
        self._chunks = [ShardGroup(own, stage, indices, read, whole) for own, indices in zip(names, cut, strict=True)]
        self._begun: dict[int, PrefectFuture[list[Any]]] = {}
        self._artifact: Any = None
        self._published = 0.0

    def __enter__(self) -> "StageTaskRuns":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, chunk in enumerate(self._chunks):
            if error is None:
                self._begin(number)
            chunk.end()
        wait(list(self._begun.values()), timeout=_PATIENCE)

    def show(self, progress: Progress) -> None:
        """Callback for `fan_out`."""
        self._publish(progress)
        for number, chunk in enumerate(self._chunks):
            if chunk.look(progress):
                self._begin(number)

    def results(self) -> list[Any]:
        """What the parts became, in the order of the shards; tasks that are given them depend on their chunks."""
        return [result for _, future in sorted(self._begun.items()) for result in future.result()]

    def _begin(self, number: int) -> None:
        if number not in self._begun:
            chunk = self._chunks[number]
            self._begun[number] = follow.submit(chunk.name, chunk, self._inputs)

    def _publish(self, progress: Progress) -> None:
        ended = len(progress.done) == progress.shards
        if time.monotonic() - self._published < _UI_PAUSE and not ended:
            return
        self._published = time.monotonic()
        share = 100.0 * progress.rows_done / progress.rows if progress.rows else 100.0
        if self._artifact is None:
            self._artifact = _tell(lambda: create_progress_artifact(share, description=self._name))
        else:
            _tell(lambda: update_progress_artifact(self._artifact, share))


class ShardGroup:
    """Some shards of a stage: what the driver saw of them last."""

    def __init__(self, name: str, stage: Stage, indices: range, read: Callable[[Path], Any], whole: bool) -> None:
        self.name = name
        self._stage, self._indices, self._read = stage, indices, read
        self._logs = _LogTail(stage.folder, indices, whole)
        self._done_before: int | None = None
        self._done = 0
        self._failures: list[ShardFailure] = []
        self._ended = threading.Event()

    def look(self, progress: Progress) -> bool:
        """Take note of the shards; whether any of them has begun. A chunk of one shard has: its log says more."""
        self._done = sum(index in progress.done for index in self._indices)
        self._failures = [progress.failed[index] for index in self._indices if index in progress.failed]
        if self._done_before is None:
            self._done_before = self._done
        if self._done + len(self._failures) == len(self._indices):
            self._ended.set()
        ended = self._done + len(self._failures)
        return len(self._indices) == 1 or ended > 0 or any(index in progress.begun for index in self._indices)

    def end(self) -> None:
        """Say that the driver looks no more."""
        self._ended.set()

    def follow(self, logger: "logging.Logger | logging.LoggerAdapter[logging.Logger]") -> list[Any]:
        """Wait for the end; pass on logs; publish counts and failures.

        Raises:
            UserError: shards failed, or the driver left before they ended.
        """
        ended = False
        while not ended:
            ended = self._ended.wait(_LOG_PAUSE if self._logs.whole else _UI_PAUSE)
            for line in self._logs.new_lines() if self._done_before != len(self._indices) else []:
                logger.info(line)
        before, shards = self._done_before or 0, len(self._indices)
        counts = {
            "shards": f"{self._indices[0]} to {self._indices[-1]}",
            "done before": before,
            "computed now": self._done - before,
            "failed": len(self._failures),
            "left": shards - self._done - len(self._failures),
        }
        _tell(lambda: create_table_artifact([counts], description=f"{self.name}: shards of {self._stage.folder}"))
        if self._failures:
            table = [
                {"shard": f.shard, "class": f.kind, "error": f.error, "log": f.log}
                for f in self._failures[:_FAILURES_SHOWN]
            ]
            _tell(lambda: create_table_artifact(table, description=f"{self.name}: failed shards"))
            for failure in self._failures[:_FAILURES_SHOWN]:
                self._announce(failure)
            for failure in self._failures[:5]:
                logger.error("shard %d (%s): %s\nlog: %s", failure.shard, failure.kind, failure.error, failure.log)
            raise ShardsFailed(self._stage, self._failures, shards)
        if self._done < shards:
            raise UserError(f"{self.name}: interrupted with {self._done} of {shards} shards done, which are kept")
        return [self._read(self._stage.part(index)) for index in self._indices]

    def _announce(self, failure: ShardFailure) -> None:
        """Send the event that automations on failed shards count."""
        emit_event(
            SHARD_FAILED,
            {"prefect.resource.id": f"montessori.stage.{self._stage.folder}", "prefect.resource.name": self.name},
            payload={"shard": failure.shard, "class": failure.kind, "error": failure.error, "log": failure.log},
        )


def _tell(publish: Callable[[], Any]) -> Any:
    """Publish something; a server that is away for a while costs what it would have shown, not the stage."""
    try:
        return publish()
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("Prefect's server does not take an artifact: %s", error)
        return None


class _LogTail:
    """The logs of the jobs at work on some shards: where they lie and, if the stage is small, what they say.

    Of a large stage, thousands of jobs say more than a page can show.
    """

    def __init__(self, folder: Path, shards: range, whole: bool) -> None:
        self._folder, self._shards, self.whole = folder, shards, whole
        self._read: dict[Path, int] = {}

    def new_lines(self) -> list[str]:
        """What is new since the last call."""
        lines = []
        for path, shards in logs_of(self._folder, self._shards).items():
            if path not in self._read:
                self._read[path] = 0
                lines.append(f"log of {_in_words(shards)}: {path}")
            if self.whole:
                lines += self._tail(path)
        return lines

    def _tail(self, path: Path) -> list[str]:
        """Whole lines that are new; of many, the last."""
        try:
            with path.open("rb") as file:
                file.seek(self._read[path])
                fresh = file.read()
        except OSError:
            return []
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read[path] += len(whole)
        lines = [line for line in whole.decode(errors="replace").splitlines() if line.strip()]
        skipped = len(lines) - _LINES_AT_A_TIME
        return [f"({skipped} lines more in {path})", *lines[-_LINES_AT_A_TIME:]] if skipped > 0 else lines


def _in_words(shards: list[int]) -> str:
    if len(shards) == 1:
        return f"shard {shards[0]}"
    if shards == list(range(shards[0], shards[-1] + 1)):
        return f"shards {shards[0]} to {shards[-1]}"
    return f"shards {', '.join(map(str, shards[:5]))}{f' and {len(shards) - 5} more' if len(shards) > 5 else ''}"


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def follow(name: str, chunk: ShardGroup, inputs: list[object]) -> list[Any]:
    """The task run of a chunk."""
    return chunk.follow(get_run_logger())
