"""Which nodes get no jobs of a stage."""

import logging
import math
import time
from collections.abc import Iterable, Set

from cluster.backends.base import Backend
from cluster.retry import OF_NODES, Openings

log = logging.getLogger(__name__)

_PAUSE = 60.0
"""Seconds for which a node is avoided where a program did not open, and until Slurm is asked again about other nodes."""


class BadNodes:
    """Keeps jobs away from broken nodes, which it tells from broken shards and programs.

    A node that lost several shards, or where several times the program did not open, gets no more of the stage. After one
    such time it gets no jobs for a minute, or until the program opens in another job. If no other node can run the jobs, it
    is used again.

    Attributes:
        avoided: nodes that get no jobs now.
        others: whether jobs can run where the program did not fail to open (`Openings.nodes`).
    """

    def __init__(self, stage: str, backend: Backend, openings: Openings, limit: int) -> None:
        """Exclude a node after `limit` losses of the stage of this name; 0: none is excluded."""
        self._stage, self._backend, self._openings, self._limit = stage, backend, openings, limit
        self._lost: dict[str, set[int | str]] = {}
        self._together: dict[str, Set[str]] = {}
        self._failed_at: dict[str, float] = {}
        self._excluded: frozenset[str] = frozenset()
        self._seen: tuple[frozenset[str], ...] | None = None
        self._reported: tuple[frozenset[str], bool] = frozenset(), True
        self._next_look = math.inf
        self.avoided: frozenset[str] = frozenset()
        self.others = True

    def count(self, node: str | None, kind: str, shard: int) -> None:
        """Count a shard that was lost on a node; a shard lost again counts once."""
        if node is not None and kind in OF_NODES:
            self._count(node, shard)

    def count_opening(self, node: str | None, job_id: str, started: Set[str]) -> None:
        """Count a job that did not open the program on a node; of those that had `started` by then, one counts."""
        if node is None:
            return
        self._failed_at[node] = time.monotonic()
        if job_id not in self._together.get(node, ()):
            self._together[node] = started
            self._count(node, job_id)

    def _count(self, node: str, shard_or_job: int | str) -> None:
        lost = self._lost.setdefault(node, set())
        lost.add(shard_or_job)
        if len(lost) == self._limit:
            self._excluded |= {node}

    def keep_away(self, jobs: Iterable[str]) -> None:
        """Choose the nodes to avoid, if there is a reason to, and keep those of `jobs` away that have not started.

        The first call lets the jobs of an earlier driver run everywhere: it does not know why nodes were avoided.
        """
        now, excluded, failed = time.monotonic(), self._excluded, self._openings.nodes
        just_failed = frozenset(node for node in failed if now < self._failed_at.get(node, -math.inf) + _PAUSE)
        bad = excluded, failed, just_failed
        if bad == self._seen and now < self._next_look:
            return
        self._seen = bad
        if any(bad) or self._next_look < math.inf:  # Slurm may not have taken the last change
            self._next_look = now + _PAUSE
        self.others = self._backend.can_run_outside(excluded | failed)
        self.avoided = excluded | just_failed if self.others else frozenset()
        if not self.others and excluded and self._backend.can_run_outside(excluded):
            self.avoided = excluded
        report = excluded, excluded <= self.avoided
        if report != self._reported:
            use = "get no more of this stage" if report[1] else "are used again, since no other can run its jobs"
            names = ", ".join(sorted(excluded))
            log.warning("%s: nodes that lost %d shards or jobs %s: %s", self._stage, self._limit, use, names)
            self._reported = report
        self._backend.keep_away(list(jobs), self.avoided)
