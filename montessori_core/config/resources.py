"""Resources of jobs, by stage."""

from collections.abc import Collection

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Minutes, Section
from montessori_core.errors import ConfigError

_TRAININGS = ("training", "teacher_update")


class Resources(Section):
    """Resources of one job of a stage. Not part of a shard's key: changing them recomputes nothing."""

    nodes: Count = Field(
        1, description="Nodes per job (`--nodes`); more than one for training and teacher update alone."
    )
    processes_per_node: Count = Field(
        1,
        description="Processes per node, one per GPU (`--ntasks-per-node`); more than one for training and teacher update "
        "alone.",
    )
    gpus_per_node: int = Field(
        0,
        ge=0,
        description="GPUs per node (`--gpus-per-node`, or as `slurm.gpu_option` says). Influence and evaluation use one.",
    )
    gpu_type: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="Slurm: type of the GPUs, such as h100. If not set, any."
    )
    cpus_per_process: Count = Field(2, description="CPU cores and threads per process (`--cpus-per-task`).")
    memory_gb: Count | None = Field(
        None,
        description="Memory per node, GB (`--mem`). If not set, the scheduler's default.",
    )
    time_limit_minutes: Minutes = Field(
        240,
        description="Wall-time limit of a job (`--time`): minutes, or a time as in sbatch, such as 12:00:00 or "
        "1-12 (36 hours).",
    )
    parallel_jobs: Count = Field(
        1,
        description="Maximum number of the stage's jobs that run at the same time. A new stage is split into enough shards "
        "to keep all of them busy; a training, and requests to an API, are one job.",
    )
    shards_per_job: Count = Field(
        16, description="Slurm: maximum number of shards per array task. Shards are spread evenly over the jobs."
    )
    infrastructure_retries: int = Field(
        3,
        ge=0,
        description="Retries of a shard after its job was lost or timed out: twice as many after a node failure, ten times "
        "as many after preemption, at most one after the job ran out of host memory. After a preemption, a node failure or a "
        "time limit, the count starts again if the shard has advanced since the last one.",
    )
    exclude_node_after: int = Field(
        3,
        ge=0,
        description="Slurm, also in an allocation: stop using a node after the jobs of this many different shards were lost "
        "on it, or the program did not open there as many times; 0 is off.",
    )
    duplicate_stragglers_after: float | None = Field(
        None,
        gt=1.0,
        description="Start a second copy of a shard, on another node, when it has run this many times as long as the median "
        "shard, no job is waiting and one more may start. The first result counts. If not set, never.",
    )


class StageResources(Section):
    """Resources by stage."""

    generation: Resources = Field(
        Resources(), description="Instruction and response generation, and answers of students to benchmarks."
    )
    training: Resources = Field(
        Resources(), description="Warm-up and student training; also the training of NOMAD's teacher."
    )
    teacher_update: Resources = Field(
        default_factory=lambda stages: stages["training"],
        description="Teacher update. If not set, those of training. The paper's batch of 2 pairs keeps at most two processes "
        "busy (with micro_batch_size 1), fewer than a node has GPUs.",
    )
    influence: Resources = Field(
        Resources(), description="Local data influence and other signals, and the trainings of `montessori validate`."
    )
    evaluation: Resources = Field(
        Resources(),
        description="Held-out loss, tasks of lm-evaluation-harness, embeddings of filters, and code that filters run.",
    )
    judging: Resources = Field(
        Resources(cpus_per_process=1), description="Requests to an API. These jobs need the network and no GPU."
    )

    @model_validator(mode="after")
    def _training_processes_have_gpus(self) -> "StageResources":
        for stage in _TRAININGS:
            resources: Resources = getattr(self, stage)
            if resources.processes_per_node > resources.gpus_per_node > 0:
                raise ValueError(
                    f"{stage}.processes_per_node ({resources.processes_per_node}) is more than {stage}.gpus_per_node "
                    f"({resources.gpus_per_node}), but each process of a training has a GPU; set both to the same number"
                )
        return self

    def refuse_idle_processes(self, unused: Collection[str] = ()) -> None:
        """Refuse jobs with several processes: one computes the rows, the others hold GPUs and wait.

        Before jobs are submitted, not when a configuration is read: folders of earlier versions have such settings.

        Args:
            unused: stages without jobs.

        Raises:
            ConfigError: a stage has such jobs; names it.
        """
        for stage, resources in self:
            if stage in (*_TRAININGS, *unused) or resources.nodes * resources.processes_per_node == 1:
                continue
            raise ConfigError(
                f"cluster.resources.{stage}: nodes is {resources.nodes} and processes_per_node "
                f"{resources.processes_per_node}, but one process computes the rows of a job; set both to 1, and "
                "parallel_jobs to the number of jobs"
            )
