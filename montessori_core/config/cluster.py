"""Where jobs run and which resources they get."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Minutes, Section, parse
from montessori_core.config.yaml import read_yaml
from montessori_core.presets import find_configuration

_SETTINGS = {  # of sbatch options; None: this program chooses the value
    **dict.fromkeys(("partition", "account", "qos", "constraint", "exclude"), "cluster.slurm.{option}"),
    "time": "cluster.resources.*.time_limit_minutes",
    "nodes": "cluster.resources.*.nodes",
    **dict.fromkeys(("ntasks", "ntasks-per-node", "tasks-per-node"), "cluster.resources.*.processes_per_node"),
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "cluster.resources.*.cpus_per_process"),
    "gpus-per-node": "cluster.resources.*.gpus_per_node and gpu_type",
    "mem": "cluster.resources.*.memory_gb",
    "array": "cluster.resources.*.parallel_jobs and shards_per_job",
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "signal"), None),
}
_GPU_OPTIONS, _MEMORY_OPTIONS = {"gpus", "gpus-per-task", "gpus-per-socket", "gres"}, {"mem-per-cpu", "mem-per-gpu"}
_DRIVER_SETTINGS = {  # as _SETTINGS, of the driver's job
    **dict.fromkeys(("partition", "account", "qos"), "cluster.slurm.driver.{option}"),
    "time": "cluster.slurm.driver.time_limit_minutes",
    "cpus-per-task": "cluster.slurm.driver.cpus",
    **dict.fromkeys(("mem", "mem-per-cpu"), "cluster.slurm.driver.memory_gb"),
    **dict.fromkeys(
        ("nodes", "ntasks", "array", "job-name", "output", "error", "open-mode", "signal", "requeue"), None
    ),
    **dict.fromkeys(("no-requeue", "parsable", "wrap"), None),
}


class Resources(Section):
    """Resources of one job of a stage. Not part of a shard's key: changing them recomputes nothing."""

    nodes: Count = Field(1, description="Nodes per job.")
    processes_per_node: Count = Field(1, description="Processes per node; for training, one per GPU.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs per node.")
    gpu_type: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="Slurm: type of the GPUs, such as h100. If not set, any."
    )
    cpus_per_process: Count = Field(2, description="CPU cores and threads per process.")
    memory_gb: Count | None = Field(None, description="Memory per node, GB. If not set, the scheduler's default.")
    time_limit_minutes: Minutes = Field(
        240,
        description="Wall-time limit of a job: minutes, or a time as in sbatch, such as 12:00:00 or 1-12 (36 hours).",
    )
    parallel_jobs: Count = Field(
        1,
        description="Maximum number of the stage's jobs that run at the same time. A new stage is split into enough shards "
        "to keep all of them busy.",
    )
    shards_per_job: Count = Field(
        16, description="Slurm: maximum number of shards per array task. Shards are spread evenly over the jobs."
    )
    infrastructure_retries: int = Field(
        3,
        ge=0,
        description="Retries of a shard after its job was lost or timed out: twice as many after a node failure, ten times "
        "as many after preemption, at most one after the job ran out of memory.",
    )
    exclude_node_after: int = Field(
        3,
        ge=0,
        description="Slurm: stop using a node after the jobs of this many different shards were lost on it; 0 is off.",
    )
    duplicate_stragglers_after: float | None = Field(
        None,
        gt=1.0,
        description="Start a second copy of a shard, on another node, when it has run this many times as long as the median "
        "shard, no job is waiting and one more may start. The first result counts. If not set, never.",
    )


class StageResources(Section):
    """Resources by stage."""

    generation: Resources = Field(Resources(), description="Instruction and response generation.")
    training: Resources = Field(Resources(), description="Warm-up and student training.")
    teacher_update: Resources = Field(
        default_factory=lambda stages: stages["training"],
        description="Teacher update. If not set, those of training. The paper's batch of 2 pairs keeps at most two processes "
        "busy, fewer than a node has GPUs.",
    )
    influence: Resources = Field(Resources(), description="Local data influence.")
    evaluation: Resources = Field(Resources(), description="Held-out loss and tasks of lm-evaluation-harness.")
    judging: Resources = Field(
        Resources(cpus_per_process=1), description="Requests to an API. These jobs need the network and no GPU."
    )


class Container(Section):
    """Container image of the worker environment, for clusters that run jobs in containers."""

    image: str = Field(description="Image: a path visible on the nodes, or a registry name in the runtime's syntax.")
    runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis",
        description="'pyxis': Slurm's plugin for enroot (srun --container-image). 'apptainer': the command, on the node.",
    )
    mounts: tuple[str, ...] = Field(
        (),
        description="Folders mounted in the container, as source:target or as one path for both. They must include the run "
        "folder, the models and the data.",
    )


def _refuse_repeated(extra: dict[str, str | int | bool], settings: dict[str, str | None], field: str) -> None:
    """Refuse additional options of sbatch that a setting, or the program, determines.

    Args:
        extra: additional options.
        settings: setting of each option; None: this program chooses the value.
        field: name of the field with additional options.

    Raises:
        ValueError: an option is refused; the message has the remedy.
    """
    for key, value in extra.items():
        option = key.strip().lstrip("-").replace("_", "-")
        if option not in settings or (option == "gres" and "gpu" not in str(value)):
            continue
        setting = (settings[option] or "").format(option=option)
        remedy = f"set {setting}" if setting else "leave its value to the program"
        raise ValueError(f"{field}: {key}: sbatch would get this option twice; remove it, and {remedy}")


class DriverJob(Section):
    """Job of the driver, with `--submit-driver`: a process on CPUs that submits the run's jobs and joins their tables."""

    partition: str | None = Field(
        None, description="Partition, preferably one for CPU jobs. If not set, `slurm.partition`."
    )
    account: str | None = Field(None, description="Account to charge. If not set, `slurm.account`.")
    qos: str | None = Field(None, description="Quality of service. If not set, `slurm.qos`.")
    time_limit_minutes: Minutes = Field(
        1440,
        description="Wall-time limit, as in `resources`. At its limit the driver goes back to the queue and then continues; "
        "the run's jobs are not affected.",
    )
    cpus: Count = Field(2, description="CPU cores.")
    memory_gb: Count | None = Field(
        8, description="Memory, GB. If null, sbatch gets no --mem: some clusters do not accept it."
    )
    setup: tuple[str, ...] = Field((), description="Shell commands to run before the driver starts, e.g. module load.")
    extra: dict[str, str | int | bool] = Field(
        {},
        description="Additional sbatch options by name, e.g. {reservation: night}. Options that another setting determines "
        "are refused.",
    )

    @model_validator(mode="after")
    def _extra_repeats_no_setting(self) -> "DriverJob":
        _refuse_repeated(self.extra, _DRIVER_SETTINGS, "extra")
        return self


class Slurm(Section):
    """How jobs are submitted to Slurm."""

    partition: str | None = Field(None, description="Partition. If not set, the cluster's default.")
    account: str | None = Field(None, description="Account to charge.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Required node features.")
    exclude: str | None = Field(None, description="Nodes to exclude, in Slurm's node-list syntax.")
    python: str | None = Field(
        None,
        description="Python of the worker environment on the nodes. If not set, the driver's Python, or the container's "
        "python3.",
    )
    setup: tuple[str, ...] = Field((), description="Shell commands to run before Python starts, e.g. module load.")
    container: Container | None = Field(
        None, description="Image to run jobs in. If not set, jobs run on the node itself."
    )
    max_array_size: Count | None = Field(
        None, description="Maximum number of tasks in a job array. If not set, Slurm's MaxArraySize minus one."
    )
    extra: dict[str, str | int | bool] = Field(
        {},
        description="Additional sbatch options by name, e.g. {reservation: night}. Options that another setting determines "
        "are refused.",
    )
    srun: tuple[str, ...] = Field((), description="Additional srun options, as on its command line: --cpu-bind=cores.")
    driver: DriverJob = Field(DriverJob(), description="Job of the driver, with `--submit-driver`.")


class Vllm(Section):
    """How vLLM uses the GPUs of a generation job. Results do not depend on it, except for rounding."""

    memory_share: float | None = Field(
        None, gt=0.0, le=1.0, description="Share of a GPU's memory that vLLM takes. If not set, vLLM's default."
    )
    max_model_len: Count | None = Field(
        None,
        description="Longest prompt with its continuation, tokens; vLLM needs a cache for one of them. If not set, the next "
        "power of two above the job's prompts and max_tokens, at most the model's positions.",
    )
    tensor_parallel: Count | None = Field(
        None,
        description="GPUs that share a copy of the model; must divide its attention heads. If not set, as few as hold the "
        "weights with room for a cache.",
    )
    data_parallel: Count | None = Field(
        None,
        description="Copies of the model in a job, each on tensor_parallel GPUs. If not set, as many as the GPUs allow.",
    )


class Cluster(Section):
    """Where jobs run and which resources they get. Changing these settings recomputes nothing."""

    profile: Literal["local", "slurm", "allocation"] = Field(
        "local",
        description="'local' runs jobs as processes on this machine; 'slurm' submits them with sbatch; 'allocation' runs "
        "them with srun on the nodes of the allocation (salloc, sbatch) in which the driver runs.",
    )
    resources: StageResources = Field(StageResources(), description="Resources by stage.")
    slurm: Slurm = Field(
        Slurm(),
        description="Slurm options; ignored by the local profile. The allocation profile uses `python`, "
        "`setup`, `container` and `srun`.",
    )
    generation_python: str | None = Field(
        None,
        description="Python of a separate environment for generation jobs (vLLM pins its own torch). If not set, the same as "
        "for all other jobs.",
    )
    vllm: Vllm = Field(Vllm(), description="How vLLM uses the GPUs of a generation job.")
    poll_seconds: float = Field(0.5, gt=0.0, description="Time between two polls of the jobs, seconds.")

    @model_validator(mode="after")
    def _extra_repeats_no_setting(self) -> "Cluster":
        settings = dict[str, str | None](_SETTINGS)
        if any(resources.gpus_per_node for _, resources in self.resources):
            settings |= dict.fromkeys(_GPU_OPTIONS, _SETTINGS["gpus-per-node"])
        if any(resources.memory_gb for _, resources in self.resources):
            settings |= dict.fromkeys(_MEMORY_OPTIONS, _SETTINGS["mem"])
        _refuse_repeated(self.slurm.extra, settings, "slurm.extra")
        return self

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
    """Read a cluster file: the `cluster` section of an experiment, with or without the key `cluster`.

    `path` may be the name of a preset.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not valid.
    """
    path = find_configuration(path, "clusters")
    content = read_yaml(path)
    return parse(Cluster, content.get("cluster", content), f"{path}: the cluster file")
