"""Which losses and failures are retried, and how often."""

_NOT_AT_FAULT = ("preempted", "time_limit", "node_failure")  # classes that do not count against a shard that advances
NOT_RETRIED = ("code_error", "disk_full")  # classes that a job reports; a retry would fail again
REMEDIES = {
    "file_system": "; check the mounts of these nodes and their file servers",
    "out_of_memory": "; raise memory_gb of the stage in cluster.resources (smaller batches need a run of another name)",
    "time_limit": "; raise time_limit_minutes of the stage in cluster.resources (smaller shards need a run of another name)",
}


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


def allowed_retries(kind: str, infrastructure_retries: int) -> int:
    """Return how often a shard is submitted again after losses of a class."""
    factors = {"preempted": 10, "node_failure": 2}  # the shard is not at fault
    # Another job on the node may have used up the memory: one retry.
    if kind == "out_of_memory":
        return min(1, infrastructure_retries)
    return factors.get(kind, 1) * infrastructure_retries
