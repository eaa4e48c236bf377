"""Which losses and failures are tried again, and how often."""

NOT_RETRIED = ("code_error", "disk_full")  # of what a job says of itself: trying again would end the same
REMEDIES = {
    "out_of_memory": "; raise memory_gb of the stage in cluster.resources, or make its batches smaller",
    "time_limit": "; raise time_limit_minutes of the stage in cluster.resources, or make its shards smaller",
}


def classify_loss(reason: str) -> str:
    """The class of a loss that the job itself could not report, from what the scheduler says of it."""
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
    """How often a shard is submitted again after losses of a class.

    Memory that ran out once may have been another job's; a preempted job did nothing wrong.
    """
    factors = {"preempted": 10, "node_failure": 2}
    if kind == "out_of_memory":
        return min(1, infrastructure_retries)
    return factors.get(kind, 1) * infrastructure_retries
