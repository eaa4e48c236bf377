"""Which losses and failures are retried, and how often."""

NOT_RETRIED = ("code_error", "disk_full")  # classes that a job reports; a retry would fail again
REMEDIES = {
    "file_system": "; see the mounts of these nodes, and their file servers",
    "out_of_memory": "; raise memory_gb of the stage in cluster.resources, or make its batches smaller",
    "time_limit": "; raise time_limit_minutes of the stage in cluster.resources, or make its shards smaller",
}


def classify_loss(reason: str) -> str:
    """Classify a loss that the job could not report itself, from the scheduler's reason."""
    classes = {
        "PREEMPTED": "preempted",
        "NODE_FAIL": "node_failure",
        "BOOT_FAIL": "node_failure",
        "launch": "node_failure",
        "OUT_OF_MEMORY": "out_of_memory",
        "TIMEOUT": "time_limit",
        "DEADLINE": "time_limit",
    }
    return next((kind for word, kind in classes.items() if word in reason), "lost")


def allowed_retries(kind: str, infrastructure_retries: int) -> int:
    """Return how often a shard is submitted again after losses of a class."""
    factors = {"preempted": 10, "node_failure": 2}  # the shard is not at fault
    # Another job on the node may have used up the memory: one retry.
    if kind == "out_of_memory":
        return min(1, infrastructure_retries)
    return factors.get(kind, 1) * infrastructure_retries
