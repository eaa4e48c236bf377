"""Which losses and failures are retried, and how often, and which nodes a stage stops using."""

import logging
from collections.abc import Set

log = logging.getLogger(__name__)

_NOT_AT_FAULT = ("preempted", "time_limit", "node_failure")  # classes that do not count against a shard that advances
NOT_RETRIED = ("code_error", "disk_full", "gpu_out_of_memory")
"""Classes that a job reports; a retry would fail again."""
OF_NODES_AT_OPENING = ("code_error", "gpu_out_of_memory")  # a library is missing there, or its GPU is smaller or in use
_OF_NODES = ("lost", "node_failure", "file_system")  # classes whose cause may be the node
_CONTINUE = "montessori run RUN_DIR/config.yaml --set"
REMEDIES = {
    "file_system": "; check the mounts of these nodes and their file servers",
    "out_of_memory": "; give the stage more memory, or on one machine fewer parallel_jobs; finished stages are kept: "
    f"{_CONTINUE} cluster.resources.STAGE.memory_gb=GB (teacher_update.micro_batch_size, training.micro_batch_size and "
    "benchmarks.batch_size may be set, too)",
    "time_limit": "; give the stage more time; finished stages are kept: "
    f"{_CONTINUE} cluster.resources.STAGE.time_limit_minutes=MINUTES",
}
_LESS_GPU_MEMORY = {
    "generation": "--set cluster.vllm.memory_share=0.8, or a smaller cluster.vllm.max_model_len",
    "training": "--set training.micro_batch_size=1, --set zero.offload=optimizer, or more processes "
    "(cluster.resources.training), see `montessori plan`",
    "teacher_update": "--set teacher_update.micro_batch_size=1, --set zero.offload=optimizer, a smaller "
    "teacher_update.max_length, or more processes (cluster.resources.teacher_update), see `montessori plan`",
    "influence": "a smaller influence.reference_batch_tokens, or --set influence.dtype=bfloat16, see `montessori plan`",
    "evaluation": "--set benchmarks.batch_size=1",
}
"""Settings that may change in a started run, by the kind of a stage."""


def classify_loss(reason: str) -> str:
    """Classify a loss that the job could not report itself, from a state of squeue or a message of srun or slurmstepd."""
    classes = {
        "PREEMPT": "preempted",
        "NODE_FAIL": "node_failure",
        "NODE FAILURE": "node_failure",
        "Node failure": "node_failure",
        "BOOT_FAIL": "node_failure",
        "launch": "node_failure",
        "OUT_OF_MEMORY": "out_of_memory",
        "Out Of Memory": "out_of_memory",
        "oom_kill": "out_of_memory",
        "TIMEOUT": "time_limit",
        "TIME LIMIT": "time_limit",
        "DEADLINE": "time_limit",
    }
    return next((kind for word, kind in classes.items() if word in reason), "lost")


def gpu_memory_remedy(stage: str) -> str:
    """Return what helps when the memory of a GPU has run out in a stage of this kind, to add to the error."""
    settings = _LESS_GPU_MEMORY.get(stage)
    if settings is None:
        return ""
    return (
        f"; needs less memory: {settings}. To continue a run: {_CONTINUE} KEY=VALUE; finished stages are kept. Only a run of "
        "another name may have another warmup or student (such as student.max_length)"
    )


class Losses:
    """Counts how often shards were lost to the same cause.

    A shard that got further than at its last such loss is counted from one again, if the cause lies outside it: a training
    may need any number of time limits.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[int, str], int] = {}
        self._reached: dict[tuple[int, str], float] = {}

    def count(self, shard: int, kind: str, rows_done: float) -> int:
        """Count a loss of class `kind`, after which `rows_done` rows of the shard are done; return how many there were."""
        loss = shard, kind
        if kind in _NOT_AT_FAULT and rows_done > self._reached.get(loss, rows_done):
            self._counts[loss] = 0
        self._reached[loss] = max(rows_done, self._reached.get(loss, 0.0))
        self._counts[loss] = self._counts.get(loss, 0) + 1
        return self._counts[loss]


class NodeLosses:
    """Tells broken nodes from broken shards and programs: a node that lost several shards is excluded from the stage.

    Attributes:
        excluded: nodes that get no more of the stage.
    """

    def __init__(self, stage: str, limit: int) -> None:
        """Exclude a node after `limit` losses of the stage of this name; 0: none is excluded."""
        self._stage, self._limit = stage, limit
        self._lost: dict[str, set[int | str]] = {}
        self._not_opened: set[str] = set()
        self.excluded: frozenset[str] = frozenset()

    def count(self, node: str | None, kind: str, shard_or_job: int | str) -> None:
        """Count a shard that was lost on a node, or a job that was lost at opening; a shard lost again counts once."""
        if node is None or kind not in _OF_NODES:
            return
        lost = self._lost.setdefault(node, set())
        lost.add(shard_or_job)
        if len(lost) == self._limit and node not in self.excluded:
            log.warning(
                "%s: node %s lost %d shards or jobs; it gets no more of this stage", self._stage, node, self._limit
            )
            self.excluded |= {node}

    def may_open_elsewhere(self, node: str | None, others: Set[str | None]) -> bool:
        """Return whether a program that did not open on a node may open on the nodes `others` of running jobs.

        It may until it fails on a second node: one broken node, which fails first, must not end a stage.
        """
        if node is not None:  # its record may be visible later
            self._not_opened.add(node)
        return len(self._not_opened) <= 1 and not others <= {node, None}


def allowed_retries(kind: str, infrastructure_retries: int) -> int:
    """Return how often a shard is submitted again after losses of a class."""
    factors = {"preempted": 10, "node_failure": 2}  # the shard is not at fault
    # Another job on the node may have used up the memory: one retry.
    if kind == "out_of_memory":
        return min(1, infrastructure_retries)
    return factors.get(kind, 1) * infrastructure_retries
