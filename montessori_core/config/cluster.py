"""Where jobs run, and what they get."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Section, parse
from montessori_core.config.yaml import read_yaml
from montessori_core.presets import find_configuration


class Resources(Section):
    """What one job of a stage asks for. Never part of a shard's key: changing it recomputes nothing."""

    nodes: Count = Field(1, description="Nodes of one job.")
    processes_per_node: Count = Field(1, description="Processes on each node (one per GPU for training).")
    gpus_per_node: int = Field(0, ge=0, description="GPUs on each node of the job.")
    cpus_per_process: Count = Field(2, description="CPU cores, and threads, of each process.")
    memory_gb: Count | None = Field(None, description="Memory of each node, GB; none takes the scheduler's default.")
    time_limit_minutes: Count = Field(240, description="Wall time after which the scheduler ends the job, minutes.")
    parallel_jobs: Count = Field(
        1, description="Most jobs of the stage at a time. A new stage is cut into shards so that all of them have work."
    )
    shards_per_job: Count = Field(
        16, description="Slurm: most shards that one array task works through. Shards are dealt evenly to the jobs."
    )
    infrastructure_retries: int = Field(
        3,
        ge=0,
        description="Times a shard is submitted again after its job was lost or timed out; twice as often after a node "
        "failed, at most once after memory ran out, and ten times as often after it was preempted.",
    )
    exclude_node_after: int = Field(
        3,
        ge=0,
        description="Slurm: a node on which the jobs of so many different shards were lost gets no more; 0 is off.",
    )
    duplicate_stragglers_after: float | None = Field(
        None,
        gt=1.0,
        description="When no job waits any more and one may still start, a shard at work for so many times as long as the "
        "median shard is started once more, on another node; the first result counts. None never does.",
    )


class StageResources(Section):
    """Resources by stage."""

    generation: Resources = Field(Resources(), description="Instruction and response generation.")
    training: Resources = Field(Resources(), description="Warm-up and student training.")
    teacher_update: Resources = Field(
        default_factory=lambda stages: stages["training"],
        description="Teacher update; none takes those of training. The paper's batch of 2 pairs has work for two processes "
        "at most, fewer than a node has GPUs.",
    )
    influence: Resources = Field(Resources(), description="Local data influence.")
    evaluation: Resources = Field(Resources(), description="Held-out loss, and tasks of lm-evaluation-harness.")
    judging: Resources = Field(
        Resources(cpus_per_process=1), description="Questions to an API; its jobs need the network, and no GPU."
    )


class Container(Section):
    """The image of the worker environment, for clusters that run jobs in containers."""

    image: str = Field(description="Image: a path visible on the nodes, or a registry's name as the runtime writes it.")
    runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis",
        description="'pyxis' is Slurm's plugin for enroot (srun --container-image); 'apptainer' runs on the node.",
    )
    mounts: tuple[str, ...] = Field(
        (),
        description="Folders seen inside, as source:target or a path that stays the same; the run folder, models and data "
        "must be among them.",
    )


class Slurm(Section):
    """How jobs are submitted to Slurm."""

    partition: str | None = Field(None, description="Partition; none takes the cluster's default.")
    account: str | None = Field(None, description="Account that is charged.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Node features asked for.")
    exclude: str | None = Field(None, description="Nodes never used, as Slurm writes node lists.")
    python: str | None = Field(
        None,
        description="Python of the worker environment on the nodes; none takes the driver's own, or python3 of the "
        "container.",
    )
    setup: tuple[str, ...] = Field((), description="Shell lines run before Python starts, e.g. module load.")
    container: Container | None = Field(None, description="Image that jobs run in; none runs them on the node itself.")
    max_array_size: Count | None = Field(
        None, description="Most tasks in one job array; none asks Slurm (its MaxArraySize minus one)."
    )
    extra: dict[str, str | int | bool] = Field(
        {}, description="More sbatch options by name, e.g. {reservation: night}."
    )
    srun: tuple[str, ...] = Field((), description="More options of srun, as it is given them, e.g. --cpu-bind=cores.")


class Cluster(Section):
    """Where jobs run and what they get."""

    profile: Literal["local", "slurm"] = Field(
        "local", description="'local' runs jobs as processes of this machine, 'slurm' submits them with sbatch."
    )
    resources: StageResources = Field(StageResources(), description="Resources by stage.")
    slurm: Slurm = Field(Slurm(), description="Slurm options; ignored by the local profile.")
    generation_python: str | None = Field(
        None,
        description="Python of another environment for generation jobs (vLLM pins its own torch); none takes the "
        "same as every job.",
    )
    poll_seconds: float = Field(0.5, gt=0.0, description="Pause between looks at the jobs, seconds.")

    @model_validator(mode="after")
    def _local_is_one_node(self) -> "Cluster":
        if self.profile == "local":
            for stage, resources in self.resources:
                if resources.nodes > 1:
                    raise ValueError(
                        f"resources.{stage}.nodes is {resources.nodes}, but profile: local has one node; set nodes: 1 "
                        "or profile: slurm"
                    )
        return self


def read_cluster(path: Path) -> Cluster:
    """Read a cluster file: the `cluster` section of an experiment, by itself or under that name.

    `path` may be the name of a preset.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit.
    """
    path = find_configuration(path, "clusters")
    content = read_yaml(path)
    return parse(Cluster, content.get("cluster", content), f"{path}: the cluster file")
