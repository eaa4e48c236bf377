"""Show a stage in Prefect's UI: one task run per group of shards, with counts, failures and logs.

Thousands of shards become at most 20 task runs. These compute nothing: each ends when the driver reports that the shards of
its group have ended. They are never cached, because the files on disk decide which shards are done.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.exceptions import PrefectException
from prefect.futures import PrefectFuture, wait
from prefect.settings import PREFECT_CLIENT_RETRY_EXTRA_CODES, temporary_settings

from cluster.fanout import ShardsFailed
from cluster.progress import Progress, ShardFailure
from cluster.stage import Stage
from cluster.status import logs_of
from montessori_core.errors import UserError

log = logging.getLogger(__name__)

SHARD_FAILED = "montessori.shard.failed"
"""Event for each failed shard, for Prefect automations; its resource is the stage."""
_UI_PAUSE = 5.0  # seconds between updates of the progress artifact
_MIN_GROUP_SIZE, _MAX_GROUPS = 25, 20  # Prefect's graph is readable up to about 200 task runs
_MAX_LINES = 100  # lines of a log that are forwarded at a time
_LOG_PAUSE = 1.0  # seconds between reads of the logs
_FAILURES_SHOWN = 100
_TIMEOUT = 20.0  # seconds that task runs have to end after their stage


class StageTaskRuns:
    """Task runs that show a stage of `fan_out` in the current flow run."""

    def __init__(
        self, name: str, stage: Stage, shards: int, inputs: Sequence[object], read: Callable[[Path], Any]
    ) -> None:
        """Divide the shards into groups.

        Args:
            name: displayed name of the stage.
            stage: the stage.
            shards: number of its shards.
            inputs: results of earlier tasks that this stage reads; they become edges of Prefect's graph.
            read: converts a finished part to the value that later tasks get.
        """
        size = max(_MIN_GROUP_SIZE, -(-shards // _MAX_GROUPS))
        ranges = [range(start, min(start + size, shards)) for start in range(0, shards, size)]
        names = [f"{name} {number}/{len(ranges)}" if len(ranges) > 1 else name for number in range(1, len(ranges) + 1)]
        self._name, self._inputs = name, list(inputs)
        forward_logs = len(ranges) == 1  # thousands of jobs log more than a page can show
        self._groups = [
            ShardGroup(group_name, stage, indices, read, forward_logs)
            for group_name, indices in zip(names, ranges, strict=True)
        ]
        self._task_runs: dict[int, PrefectFuture[list[Any]]] = {}
        self._artifact: Any = None
        self._published_at = 0.0

    def __enter__(self) -> "StageTaskRuns":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, group in enumerate(self._groups):
            if error is None:
                self._start_task_run(number)
            group.end()
        wait(list(self._task_runs.values()), timeout=_TIMEOUT)

    def show(self, progress: Progress) -> None:
        """Callback for `fan_out`."""
        self._publish_progress(progress)
        for number, group in enumerate(self._groups):
            if group.update(progress):
                self._start_task_run(number)

    def results(self) -> list[Any]:
        """Return the values read from the parts, in the order of the shards; they carry the edges of Prefect's graph."""
        return [result for _, future in sorted(self._task_runs.items()) for result in future.result()]

    def _start_task_run(self, number: int) -> None:
        if number not in self._task_runs:
            group = self._groups[number]
            self._task_runs[number] = follow.submit(group.name, group, self._inputs)

    def _publish_progress(self, progress: Progress) -> None:
        done = len(progress.done) == progress.shards
        if time.monotonic() - self._published_at < _UI_PAUSE and not done:
            return
        self._published_at = time.monotonic()
        percent = 100.0 * progress.rows_done / progress.rows if progress.rows else 100.0
        if self._artifact is None:
            self._artifact = _publish(lambda: create_progress_artifact(percent, description=self._name))
        else:
            _publish(lambda: update_progress_artifact(self._artifact, percent))


class ShardGroup:
    """A group of shards of a stage, with the last state that the driver reported."""

    def __init__(
        self, name: str, stage: Stage, indices: range, read: Callable[[Path], Any], forward_logs: bool
    ) -> None:
        self.name = name
        self._stage, self._indices, self._read = stage, indices, read
        self._logs = _LogTail(stage.folder, indices, forward_logs)
        self._done_before: int | None = None
        self._done = 0
        self._failures: list[ShardFailure] = []
        self._announced: set[int] = set()
        self._ended = threading.Event()

    def update(self, progress: Progress) -> bool:
        """Store the state of the shards; return whether to start the task run: a shard has begun, or there is only one.

        The task run of a single shard starts early to show its log.
        """
        self._done = sum(index in progress.done for index in self._indices)
        self._failures = [progress.failed[index] for index in self._indices if index in progress.failed]
        if self._done_before is None:
            self._done_before = self._done
        ended = self._done + len(self._failures)
        if ended == len(self._indices):
            self._ended.set()
        return len(self._indices) == 1 or ended > 0 or any(index in progress.begun for index in self._indices)

    def end(self) -> None:
        """Tell the task run that no more updates follow."""
        self._ended.set()

    def follow(self, logger: "logging.Logger | logging.LoggerAdapter[logging.Logger]") -> list[Any]:
        """Wait for the shards to end, forward their logs, publish counts and failures; return the values read from parts.

        Raises:
            UserError: shards failed, or the driver was interrupted before they ended.
        """
        ended = False
        while not ended:
            ended = self._ended.wait(_LOG_PAUSE if self._logs.forward else _UI_PAUSE)
            for line in self._logs.new_lines() if self._done_before != len(self._indices) else []:
                logger.info(line)
            self._announce_failures()
        before, shards = self._done_before or 0, len(self._indices)
        counts = {
            "shards": f"{self._indices[0]} to {self._indices[-1]}",
            "done before": before,
            "computed now": self._done - before,
            "failed": len(self._failures),
            "left": shards - self._done - len(self._failures),
        }
        _publish(lambda: create_table_artifact([counts], description=f"{self.name}: shards of {self._stage.folder}"))
        if self._failures:
            table = [_describe_failure(failure) for failure in self._failures[:_FAILURES_SHOWN]]
            _publish(lambda: create_table_artifact(table, description=f"{self.name}: failed shards"))
            for failure in self._failures[:5]:
                logger.error("shard %d (%s): %s\nlog: %s", failure.shard, failure.kind, failure.error, failure.log)
            raise ShardsFailed(self._stage, self._failures, shards)
        if self._done < shards:
            raise UserError(f"{self.name}: interrupted; {self._done} of {shards} shards are done and kept")
        return [self._read(self._stage.part(index)) for index in self._indices]

    def _announce_failures(self) -> None:
        """Emit an event for each failure that has none yet; for a hundred of the group at most."""
        stage = {"prefect.resource.id": f"montessori.stage.{self._stage.folder}", "prefect.resource.name": self.name}
        for failure in self._failures:
            if failure.shard not in self._announced and len(self._announced) < _FAILURES_SHOWN:
                self._announced.add(failure.shard)
                emit_event(SHARD_FAILED, stage, payload=_describe_failure(failure))


def _describe_failure(failure: ShardFailure) -> dict[str, Any]:
    return {"shard": failure.shard, "class": failure.kind, "error": failure.error, "log": failure.log}


def _publish(create: Callable[[], Any]) -> Any:
    """Create or update an artifact; an unavailable server loses the artifact but does not fail the stage."""
    try:
        # States are sent again for a minute while the server's database is away; a stage does not wait for its artifacts.
        with temporary_settings({PREFECT_CLIENT_RETRY_EXTRA_CODES: ""}):
            return create()
    except (httpx.HTTPError, PrefectException) as error:
        log.warning("Prefect's server did not accept an artifact: %s", error)
        return None


class _LogTail:
    """Logs of the jobs of a group of shards: their paths and, if `forward`, their lines."""

    def __init__(self, folder: Path, shards: range, forward: bool) -> None:
        self._folder, self._shards, self.forward = folder, shards, forward
        self._offsets: dict[Path, int] = {}

    def new_lines(self) -> list[str]:
        """Return the lines added since the last call; none while the folder cannot be read: logs are only shown."""
        lines = []
        try:
            logs = logs_of(self._folder, self._shards)
        except (OSError, UserError):
            return []
        for path, shards in logs.items():
            if path not in self._offsets:
                self._offsets[path] = 0
                lines.append(f"log of {_describe_shards(shards)}: {path}")
            if self.forward:
                lines += self._read_new(path)
        return lines

    def _read_new(self, path: Path) -> list[str]:
        """Return the new complete lines of a log, at most the last `_MAX_LINES`."""
        try:
            with path.open("rb") as file:
                file.seek(self._offsets[path])
                content = file.read()
        except OSError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        self._offsets[path] += len(complete)
        lines = [line for line in complete.decode(errors="replace").splitlines() if line.strip()]
        skipped = len(lines) - _MAX_LINES
        return [f"({skipped} more lines in {path})", *lines[-_MAX_LINES:]] if skipped > 0 else lines


def _describe_shards(shards: list[int]) -> str:
    if len(shards) == 1:
        return f"shard {shards[0]}"
    if shards == list(range(shards[0], shards[-1] + 1)):
        return f"shards {shards[0]} to {shards[-1]}"
    return f"shards {', '.join(map(str, shards[:5]))}{f' and {len(shards) - 5} more' if len(shards) > 5 else ''}"


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def follow(name: str, group: ShardGroup, inputs: list[object]) -> list[Any]:
    """Run as the task run of a group of shards."""
    return group.follow(get_run_logger())
