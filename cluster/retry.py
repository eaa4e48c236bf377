"""Which losses and failures are retried, how often, and what ends a stage."""

from collections import Counter
from collections.abc import Set

_NOT_AT_FAULT = ("preempted", "time_limit", "node_failure")  # classes that do not count against a shard that advances
NOT_RETRIED = ("code_error", "disk_full", "gpu_out_of_memory")
"""Classes that a job reports; a retry would fail again."""
OF_NODES = ("lost", "node_failure", "file_system")  # classes whose cause may be the node
# At opening, too: a library is missing there, or its GPU is smaller or in use.
_OF_CODE = ("code_error", "gpu_out_of_memory")
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
    "evaluation": "--set benchmarks.batch_size=1 (benchmarks), or a smaller influence.reference_batch_tokens (held-out loss)",
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


class Openings:
    """Decides what follows when jobs end before they have computed anything: is it the node, the program or the shard?

    The program has opened once a job has computed a row, or failed at one. Failures count in a row, which ends when another
    job opens the program.

    * Jobs that ran at the same time count once: a file server may hinder them together.
    * A node counts once, while another one can run the jobs. After an error it gets none for a minute
      (`cluster.nodes.BadNodes`).
    * The stage ends when failures of one class count more often than a shard may be lost to it, and at least twice; at once
      if the disk is full; and, if no job of the stage has opened the program, when the code failed on two nodes, or on the
      only one that can run the jobs. Jobs that have opened the program finish.
    * No shard uses up retries, unless the cause may be the shard. This is so if a job dies without an error of its own before
      the program has opened; and once it has, if it does not load for the rows of a shard (`NotOpened`). Such a failure ends
      the stage only if more shards than run at a time failed so in the row.

    Attributes:
        jobs: jobs that have opened the program, by the ids that they know.
        nodes: nodes where it did not open in this row.
    """

    def __init__(self, infrastructure_retries: int, parallel_jobs: int) -> None:
        self._retries, self._parallel_jobs = infrastructure_retries, parallel_jobs
        self.jobs: set[str] = set()
        self._begin_row()

    def _begin_row(self) -> None:
        self._together: Set[str] = frozenset()
        self._failures: Counter[str] = Counter()
        self._of_code: frozenset[str] = frozenset()
        self.nodes: frozenset[str] = frozenset()
        self._shards: set[int] = set()

    @property
    def failures(self) -> int:
        """How often the program failed to open in this row."""
        return self._failures.total()

    def note_opened(self, jobs: Set[str]) -> None:
        """Note jobs that have computed rows, or failed at one."""
        if not jobs <= self.jobs:
            self.jobs |= jobs
            self._begin_row()

    def count_failure(
        self,
        job_id: str,
        node: str | None,
        kind: str,
        started: Set[str],
        other_node: bool,
        shard: int | None = None,
    ) -> None:
        """Count a job that did not open the program, for an error of class `kind`.

        Args:
            job_id: id that the job knows.
            node: None if its record is not visible yet.
            kind: class of the error, or of the loss.
            started: jobs that have started by now.
            other_node: whether jobs can run on a node where the program did not fail in this row.
            shard: the shard, if it may be the cause.
        """
        if job_id not in self._together and not (node in self.nodes and other_node):
            self._together = started
            self._failures[kind] += 1
        here = frozenset({node} if node else ())
        self.nodes |= here
        self._of_code |= here if kind in _OF_CODE else frozenset()
        self._shards |= set() if shard is None else {shard}

    @staticmethod
    def loss_of(kind: str) -> str:
        """Return the class of the loss of a job whose program failed to open with an error of class `kind`."""
        return "lost" if kind in _OF_CODE else kind

    def may_explain(self, kind: str) -> bool:
        """Return whether a job that was lost without an error of its own may not have opened the program."""
        return not self.jobs and kind in ("lost", "out_of_memory")

    def end_stage(self, kind: str, other_node: bool, shard: int | None = None) -> bool:
        """Return whether the failures end the stage; the arguments are those of `count_failure` for the last one."""
        if kind in _OF_CODE and not self.jobs:
            only_node = not other_node and self.nodes == self._of_code
            if len(self._of_code) > 1 or only_node:
                return True
        if self.loss_of(kind) in NOT_RETRIED:
            return True
        if shard is not None and len(self._shards) <= self._parallel_jobs:
            return False
        # Even if shards are not retried: one broken node must not end a stage.
        return self._failures[kind] > max(1, allowed_retries(kind, self._retries))


def allowed_retries(kind: str, infrastructure_retries: int) -> int:
    """Return how often a shard is submitted again after losses of a class."""
    factors = {"preempted": 10, "node_failure": 2}  # the shard is not at fault
    # Another job on the node may have used up the memory: one retry.
    if kind == "out_of_memory":
        return min(1, infrastructure_retries)
    return factors.get(kind, 1) * infrastructure_retries
