"""Check a cluster before a run depends on it. A finding states the observation and, for a problem, the remedy."""

import math
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.backends.base import SchedulerUnavailable
from cluster.backends.command import run_command
from cluster.backends.sbatch import check_script
from cluster.backends.slurm import largest_array, seconds_of
from cluster.driver_job import script_of
from cluster.fanout import ShardsFailed, fan_out
from cluster.progress import Progress
from cluster.scripts import options_in, scripts_of
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.config import Cluster, HeldJobs, Resources
from montessori_core.data.rows import Rows
from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.versions import declared

_SLURM_TIMEOUT = 60.0  # seconds for a Slurm command
_TRAINING_PACKAGES = ("torch", "transformers", "trl", "deepspeed", "accelerate", "safetensors", "pyarrow", "scipy")
_GENERATION_PACKAGES = ("vllm", "torch", "transformers", "pyarrow")
_JUDGING_PACKAGES = ("openai", "pyarrow")
_JOB_REMEDY = (
    "is this folder on a shared file system, and does the Python that the configuration names exist on the nodes?"
)
_NETWORK_REMEDY = (
    "nodes must reach each other by their host names, on any port; name the interface in cluster.slurm.setup: "
    "export NCCL_SOCKET_IFNAME=... GLOO_SOCKET_IFNAME=..."
)


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: name of the check.
        good: whether the check passed; None for information.
        seen: observation.
        remedy: how to fix a problem.
    """

    check: str
    good: bool | None
    seen: str
    remedy: str = ""


class _TestJobTimeout(Exception):
    """A test job did not finish in time."""


def check_cluster(cluster: Cluster, folder: Path, patience: float) -> Iterator[Finding]:
    """Check a cluster; submit test jobs only if the scheduler passes its checks.

    Test jobs have short time limits: if the caller is killed, nobody cancels them.

    Args:
        cluster: configuration to check.
        folder: folder on the file system of the runs; a scratch folder is created and removed there.
        patience: seconds that a test job may take, including its time in the queue.

    Raises:
        ConfigError: jobs would have idle processes.
    """
    cluster.resources.refuse_idle_processes()
    if cluster.profile == "slurm":
        findings = list(_check_slurm(cluster))
        yield from findings
        if any(finding.good is False for finding in findings):
            yield Finding("jobs", None, "not tried: fix the problems above first")
            return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder, ignore_cleanup_errors=True) as scratch:
            yield from _check_nodes(cluster, Path(scratch).resolve(), patience)
    except OSError as error:
        yield Finding("run folder", False, f"{folder}: {error.strerror}", "name a writable folder with --run-root")


def _check_slurm(cluster: Cluster) -> Iterator[Finding]:
    missing = [command for command in ("sbatch", "srun", "squeue", "scancel", "sinfo") if shutil.which(command) is None]
    if missing:
        yield Finding(
            "Slurm's commands", False, f"no {', '.join(missing)} here", "start on a login node of the cluster"
        )
        return
    answer = run_command("sinfo", "--noheader", "--format=%P|%G|%D|%l", timeout=_SLURM_TIMEOUT)
    if answer is None:
        yield Finding(
            "scheduler", False, "sinfo does not answer", "check slurmctld (scontrol ping), and munge on this host"
        )
        return
    partitions = [line.split("|") for line in answer.splitlines() if line]
    yield Finding("scheduler", True, f"answers, {len({name for name, *_ in partitions})} partitions")
    accounting = run_command("sacct", "--noheader", "--allocations", "--jobs=1", timeout=_SLURM_TIMEOUT) is not None
    seen = "available" if accounting else "none: optional, but reports of failures have fewer details"
    yield Finding("accounting", None, seen)

    stages = {stage: cluster.slurm.of_stage(stage).partition for stage, _ in cluster.resources}
    for partition in dict.fromkeys(stages.values()):
        jobs = [resources for stage, resources in cluster.resources if stages[stage] == partition]
        yield from _check_partition(partition, partitions, jobs, cluster.slurm.hold)
    yield from _check_scripts(cluster)
    limit, configured = largest_array(), cluster.slurm.max_array_size
    if limit is not None and configured is not None:
        yield Finding(
            "array size",
            configured < limit,
            f"MaxArraySize is {limit}, cluster.slurm.max_array_size {configured}",
            f"set cluster.slurm.max_array_size to {limit - 1} or less, or to null",
        )


def _check_partition(
    name: str | None, partitions: Sequence[Sequence[str]], jobs: Sequence[Resources], hold: HeldJobs | None
) -> Iterator[Finding]:
    """Check that a partition, or several separated by commas, can hold jobs; a `name` of None is the cluster's default."""
    wanted = name.split(",") if name else []
    rows = [row for row in partitions if (row[0].rstrip("*") in wanted if wanted else row[0].endswith("*"))]
    names = {row[0].rstrip("*") for row in partitions}
    missing = sorted(set(wanted) - names)
    if not rows or missing:
        seen = f"no partition {', '.join(missing)}" if missing else "the cluster has no default partition"
        remedy = "set cluster.slurm.partition, or that of the stage in cluster.slurm.stages, to one of them"
        yield Finding("partition", False, f"{seen}; available: {', '.join(sorted(names))}", remedy)
        return
    title = name or rows[0][0].rstrip("*")
    yield Finding("partition", True, f"{title}: {sum(int(row[2]) for row in rows)} nodes")
    requested = max(resources.gpus_per_node for resources in jobs)
    if requested:
        available = max(_gpus(row[1]) for row in rows)
        yield Finding(
            f"GPUs of {title}",
            available >= requested,
            f"{available} per node, {requested} requested",
            "lower cluster.resources.*.gpus_per_node, choose another partition, or have gres.conf corrected",
        )
    longest = max(resources.time_limit_minutes for resources in jobs) + (hold.minutes if hold else 0)
    allowed = max(seconds_of(row[3]) / 60 for row in rows)
    yield Finding(
        f"time limits of {title}",
        longest <= allowed,
        f"{allowed:g} minutes in the partition, {longest} requested",
        "lower cluster.resources.*.time_limit_minutes"
        f"{' or cluster.slurm.hold.minutes (held jobs ask for both)' if hold else ''}, or choose another partition",
    )


def _check_scripts(cluster: Cluster) -> Iterator[Finding]:
    """Show the sbatch options of each stage's jobs and of the driver's, and have Slurm check them (`sbatch --test-only`)."""
    for text, stages in (
        scripts_of(cluster) | {script_of(Path(), "driver", [], {}, cluster.slurm): ["driver"]}
    ).items():
        options = options_in(text)
        try:
            refusal = check_script(text)
        except SchedulerUnavailable as error:
            refusal = str(error)
        yield Finding(
            f"sbatch options of {', '.join(stages)}",
            refusal is None,
            f"{options}: {refusal}" if refusal else options,
            "change cluster.slurm.driver; it matters only with --submit-driver"
            if stages == ["driver"]
            else "change cluster.slurm (or its stages) and cluster.resources",
        )


def _check_nodes(cluster: Cluster, scratch: Path, patience: float) -> Iterator[Finding]:
    token = scratch / "token"
    token.write_text(uuid.uuid4().hex)
    ranges = declared(["train"])
    for kind, packages in _packages_by_stage(cluster).items():
        resources: Resources = getattr(cluster.resources, kind)
        python = cluster.generation_python if kind == "generation" else None
        stage = Stage(
            program="look-around",
            version=1,
            entry="cluster.doctor_jobs:open_node_report",
            settings={
                "packages": {name: ranges.get(name, "") for name in packages},
                "compiler": needs_compiler(kind, resources),
            },
            inputs={"token": token},
            input_hashes={},
            folder=scratch / kind,
            suffix=".json",
            kind=kind,
            check_gpus=False,  # the report counts them
        )
        single = _of_test_job(resources, patience, nodes=1, processes=1)
        report = _run_test_job(stage, single, cluster, patience, _JOB_REMEDY, python)
        if isinstance(report, Finding):
            yield report
            return
        yield from check_report(kind, report, token.read_text(), resources)
    nodes = 2 if cluster.profile == "slurm" else 1
    pair = _of_test_job(cluster.resources.training, patience, nodes=nodes, processes=2 // nodes)
    entry, folder = "cluster.doctor_jobs:open_all_reduce", scratch / "together"
    stage = Stage("all-reduce", 1, entry, {}, {}, {}, folder, ".json", "training", check_gpus=False)
    report = _run_test_job(stage, pair, cluster, patience, _NETWORK_REMEDY)
    if isinstance(report, Finding):
        yield report
        return
    yield Finding(
        f"all-reduce over {nodes} nodes" if nodes > 1 else "all-reduce of two processes",
        report["sum"] == 2.0,
        f"{report['processes']} processes, sum {report['sum']:g}",
        _NETWORK_REMEDY,
    )


def needs_compiler(kind: str, resources: Resources) -> bool:
    """Return whether jobs of a stage compile kernels, which Triton does on GPUs for vLLM and TRL."""
    return bool(resources.gpus_per_node) and kind in ("generation", "training", "teacher_update")


def _of_test_job(resources: Resources, patience: float, nodes: int, processes: int) -> Resources:
    """Return the resources of a test job: those of a stage's jobs, but for its size, its time limit and retries."""
    minutes = math.ceil(patience / 60) + 2  # Slurm's signal, up to 90 s before the limit, must not come earlier
    return resources.model_copy(
        update={
            "nodes": nodes,
            "processes_per_node": processes,
            "infrastructure_retries": 0,
            "time_limit_minutes": min(resources.time_limit_minutes, minutes),
        }
    )


def _packages_by_stage(cluster: Cluster) -> dict[str, tuple[str, ...]]:
    """Return the packages that the jobs of a stage need, for each stage whose jobs may differ from those of the others."""
    generation = _TRAINING_PACKAGES if cluster.generation_python is None else _GENERATION_PACKAGES
    needed = {"generation": generation, "judging": _JUDGING_PACKAGES}
    differ = {"influence", "training", *cluster.slurm.stages}
    if cluster.resources.teacher_update != cluster.resources.training:
        differ.add("teacher_update")
    if cluster.generation_python is not None:
        differ.add("generation")
    return {stage: needed.get(stage, _TRAINING_PACKAGES) for stage, _ in cluster.resources if stage in differ}


def check_report(kind: str, report: dict[str, Any], token: str, resources: Resources) -> Iterator[Finding]:
    """Check what a node reported; see `cluster.doctor_jobs`."""
    shared = report["token"] == token
    yield Finding(
        f"{kind} job: file system",
        shared,
        f"{report['host']} and this host see {'the same' if shared else 'different'} files",
        "put --run-root on a file system that all nodes share",
    )
    versions = ", ".join(f"{name} {number}" for name, number in list(report["versions"].items())[:4])
    yield Finding(
        f"{kind} job: environment",
        not report["wrong"],
        f"Python {report['python']}, {versions}" + "".join(f"; {name}: {why}" for name, why in report["wrong"].items()),
        "run make install-generation VENV=..., and set cluster.generation_python to that environment's Python"
        if kind == "generation"
        else "pip install 'montessori[train]' into the environment that cluster.slurm.python names",
    )
    if resources.gpus_per_node:
        yield Finding(
            f"{kind} job: GPUs",
            report["gpus"] >= resources.gpus_per_node,
            f"torch sees {report['gpus']} of {resources.gpus_per_node}",
            "install torch's CUDA build for the nodes' driver, and check that jobs get their GPUs (gres, cgroups)",
        )
    if "compiler" in report:
        yield Finding(
            f"{kind} job: C compiler",
            report["cannot_compile"] is None,
            report["cannot_compile"] or report["compiler"],
            "Triton compiles kernels on the node: install gcc and Python's headers there (python3-dev), or make them "
            "available in cluster.slurm.setup, such as module load gcc or export CC=...",
        )


def _run_test_job(
    stage: Stage, resources: Resources, cluster: Cluster, patience: float, remedy: str, python: str | None = None
) -> dict[str, Any] | Finding:
    """Return the report of a test job, or a finding that says why there is none."""
    deadline = time.monotonic() + patience

    def check_time(progress: Progress) -> None:
        if time.monotonic() > deadline:
            raise _TestJobTimeout

    name = f"{stage.name} job"
    try:
        (part,) = fan_out(stage, Shards(Rows.of([{"probe": 1}]), 1), resources, cluster, check_time, python)
    except _TestJobTimeout:
        return Finding(
            name,
            False,
            f"no result within {patience:.0f} s; its jobs were cancelled",
            "the queue may be full (squeue --start), or no node satisfies cluster.resources; raise --patience",
        )
    except ShardsFailed as error:
        failure = error.failures[0]
        log = Path(failure.log)
        lines = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        return Finding(name, False, f"{failure.kind}: {failure.error} {' '.join(lines)}", remedy)
    except UserError as error:
        return Finding(name, False, str(error), "see cluster.slurm and cluster.resources")
    report: dict[str, Any] = read_json(part)
    return report


def _gpus(gres: str) -> int:
    """Count the GPUs in a node's generic resources, e.g. gpu:h100:8(S:0-1),nvme:1."""
    return sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
