"""How jobs are submitted to Slurm: options of all stages, of single stages and of the driver's job."""

import shlex
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from montessori_core.config.resources import Resources
from montessori_core.config.section import Count, Minutes, Section, VariableName
from montessori_core.program import Kind

_SETTINGS = {  # of sbatch options; None: this program chooses the value
    **dict.fromkeys(("partition", "account", "qos", "constraint", "exclude", "exclusive"), "cluster.slurm.{option}"),
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


def _plain_names(options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    return {name.strip().lstrip("-").replace("_", "-"): value for name, value in options.items()}


SbatchOptions = Annotated[dict[str, str | int | bool], AfterValidator(_plain_names)]
"""Options by their names without dashes in front; true: without a value, false: not at all."""


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
    for option, value in extra.items():
        if option not in settings or (option == "gres" and "gpu" not in str(value)):
            continue
        setting = (settings[option] or "").format(option=option)
        remedy = f"set {setting}" if setting else "leave its value to the program"
        raise ValueError(f"{field}: {option}: sbatch would get this option twice; remove it, and {remedy}")


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
    extra: SbatchOptions = Field(
        {},
        description="Additional sbatch options, as in `slurm.extra`.",
    )

    @model_validator(mode="after")
    def _extra_repeats_no_setting(self) -> "DriverJob":
        _refuse_repeated(self.extra, _DRIVER_SETTINGS, "extra")
        return self


class HeldJobs(Section):
    """Slurm jobs that the driver holds from one stage to the next. A job starts in one that is free, without queueing."""

    minutes: Count = Field(
        240,
        description="Minutes during which a held job accepts work. Its wall-time limit is longer by the time limit of the "
        "stage that asked for it, and a stage uses it only while its own limit fits.",
    )
    idle_minutes: float = Field(
        10.0, gt=0.0, description="Minutes without work after which a held job ends; all of them end with the run."
    )


class JobOptions(Section):
    """Options of jobs. Those of a stage replace those of all stages, except where they are null or empty."""

    partition: str | None = Field(None, description="Partition (`--partition`). If not set, the cluster's default.")
    account: str | None = Field(None, description="Account to charge (`--account`).")
    qos: str | None = Field(None, description="Quality of service (`--qos`).")
    constraint: str | None = Field(None, description="Required node features (`--constraint`).")
    exclude: str | None = Field(None, description="Nodes to exclude, in Slurm's node-list syntax (`--exclude`).")
    exclusive: bool | None = Field(
        None, description="Whether a job gets nodes of its own (`--exclusive`). If not set, it may share them."
    )
    gpu_option: Literal["gpus-per-node", "gres"] | None = Field(
        None,
        description="Option that asks for GPUs: `--gpus-per-node=h100:8`, or `--gres=gpu:h100:8` for older releases of "
        "Slurm. If not set, gpus-per-node.",
    )
    container: Container | None = Field(
        None, description="Image to run jobs in. If not set, jobs run on the node itself."
    )
    setup: tuple[str, ...] = Field((), description="Shell commands to run before Python starts, e.g. module load.")
    environment: dict[VariableName, str] = Field(
        {},
        description="Environment variables (`export` before `setup`), e.g. {NCCL_SOCKET_IFNAME: ib0}. The shell does not "
        "expand their values.",
    )
    extra: SbatchOptions = Field(
        {},
        description="Additional sbatch options by name: {reservation: night} is `--reservation=night`, true an option "
        "without a value, false none. Options that another setting determines are refused.",
    )
    srun: tuple[str, ...] = Field((), description="Additional srun options, as on its command line: --cpu-bind=cores.")

    @property
    def commands(self) -> list[str]:
        """Shell commands to run before Python starts."""
        return [*(f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()), *self.setup]


class Slurm(JobOptions):
    """How jobs are submitted to Slurm."""

    python: str | None = Field(
        None,
        description="Python of the worker environment on the nodes. If not set, the driver's Python, or the container's "
        "python3.",
    )
    max_array_size: Count | None = Field(
        None, description="Maximum number of tasks in a job array. If not set, Slurm's MaxArraySize minus one."
    )
    stages: dict[Kind, JobOptions] = Field(
        {},
        description="Options of single stages, by their names in `resources`, e.g. {judging: {partition: cpu}}. They replace "
        "the options above; `environment` and `extra` are added to them.",
    )
    driver: DriverJob = Field(DriverJob(), description="Job of the driver, with `--submit-driver`.")
    hold: HeldJobs | None = Field(
        None,
        description="Hold jobs between stages: they are queued once, and serve every stage of the run that asks sbatch for "
        "the same. If not set, each stage submits its own.",
    )

    def of_stage(self, stage: str) -> "Slurm":
        """Return the settings of a stage's jobs: `stages` applied. A name that is not a stage gets those of all stages."""
        options = next((options for name, options in self.stages.items() if name == stage), JobOptions())
        changes = {name: value for name, value in options if value not in (None, (), {})}
        added = {name: getattr(self, name) | getattr(options, name) for name in ("environment", "extra")}
        return self.model_copy(update={**changes, **added})

    def refuse_repeated_options(self, resources: Mapping[str, Resources]) -> None:
        """Refuse options in `extra` that a setting determines.

        Args:
            resources: of each stage.

        Raises:
            ValueError: an option would reach sbatch twice; the message has the remedy.
        """
        _refuse_repeated(self.extra, _settings(resources.values()), "slurm.extra")
        for stage, options in self.stages.items():
            _refuse_repeated(options.extra, _settings([resources[stage]]), f"slurm.stages.{stage}.extra")


def _settings(resources: Collection[Resources]) -> dict[str, str | None]:
    """Return the settings of sbatch options, for jobs with these resources."""
    settings = dict[str, str | None](_SETTINGS)
    if any(needed.gpus_per_node for needed in resources):
        settings |= dict.fromkeys(_GPU_OPTIONS, _SETTINGS["gpus-per-node"])
    if any(needed.memory_gb for needed in resources):
        settings |= dict.fromkeys(_MEMORY_OPTIONS, _SETTINGS["mem"])
    return settings
