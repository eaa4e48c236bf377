"""Checking a cluster before a run depends on it: each finding names what was seen and, if it is bad, the remedy."""

import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.backends.command import ask
from cluster.backends.slurm import largest_array
from cluster.fanout import Progress, ShardsFailed, fan_out
from cluster.shards import Shards
from cluster.stage import Stage
from montessori_core.config import Cluster, Resources
from montessori_core.data.rows import Rows
from montessori_core.errors import UserError
from montessori_core.files import read_json
from montessori_core.versions import declared

_ANSWER = 60.0  # seconds for a command of Slurm
_TRAINING = ("torch", "transformers", "trl", "deepspeed", "accelerate", "safetensors", "pyarrow", "scipy")
_GENERATION = ("vllm", "torch", "transformers", "pyarrow")


_UNSTARTED = (
    "is this folder on a shared file system, and does the Python that the configuration names exist on the nodes?"
)
_APART = (
    "nodes must reach each other by their host names, on any port; name the interface in cluster.slurm.setup: "
    "export NCCL_SOCKET_IFNAME=... GLOO_SOCKET_IFNAME=..."
)


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: what was looked at.
        good: whether it is as it should be; None for what is only worth knowing.
        seen: what was found.
        remedy: what to do about it.
    """

    check: str
    good: bool | None
    seen: str
    remedy: str = ""


class _TooLong(Exception):
    """A probe's job did not end in time."""


def examine(cluster: Cluster, folder: Path, patience: float) -> Iterator[Finding]:
    """Check a cluster, one finding after another; jobs are submitted only if the scheduler is there.

    Args:
        cluster: the configuration under test.
        folder: on the file system where runs will lie; a scratch folder is made and removed there.
        patience: seconds that a probe's job may take, the time in the queue included.
    """
    if cluster.profile == "slurm":
        findings = list(_examine_slurm(cluster))
        yield from findings
        if any(finding.good is False for finding in findings):
            yield Finding("jobs", None, "not tried: mend the above first")
            return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder, ignore_cleanup_errors=True) as scratch:
            yield from _examine_nodes(cluster, Path(scratch).resolve(), patience)
    except OSError as error:
        yield Finding("run folder", False, f"{folder}: {error.strerror}", "give a folder you can write with --run-root")


def _examine_slurm(cluster: Cluster) -> Iterator[Finding]:
    absent = [command for command in ("sbatch", "squeue", "scancel", "sinfo") if shutil.which(command) is None]
    if absent:
        yield Finding("Slurm's commands", False, f"no {', '.join(absent)} here", "start on a login node of the cluster")
        return
    answer = ask("sinfo", "--noheader", "--format=%P|%G|%D|%l", timeout=_ANSWER)
    if answer is None:
        yield Finding(
            "scheduler", False, "sinfo gets no answer", "is slurmctld up (scontrol ping), and munge on this host?"
        )
        return
    partitions = [line.split("|") for line in answer.splitlines() if line]
    yield Finding("scheduler", True, f"answers, {len({name for name, *_ in partitions})} partitions")
    accounting = ask("sacct", "--noheader", "--allocations", "--jobs=1", timeout=_ANSWER) is not None
    yield Finding("accounting", None, "there" if accounting else "none: it is not needed, but failures say less")

    wanted = cluster.slurm.partition
    fitting = [row for row in partitions if (row[0].rstrip("*") == wanted if wanted else row[0].endswith("*"))]
    names = ", ".join(sorted({name.rstrip("*") for name, *_ in partitions}))
    if not fitting:
        seen = f"no partition {wanted!r}" if wanted else "the cluster has no default partition"
        yield Finding("partition", False, f"{seen}; there are {names}", "set cluster.slurm.partition to one of them")
        return
    yield Finding("partition", True, f"{fitting[0][0].rstrip('*')}: {sum(int(row[2]) for row in fitting)} nodes")
    most = max(resources.gpus_per_node for _, resources in cluster.resources)
    if most:
        offered = max(_gpus(row[1]) for row in fitting)
        yield Finding(
            "GPUs",
            offered >= most,
            f"{offered} a node, {most} asked for",
            "lower cluster.resources.*.gpus_per_node, choose another partition, or ask for gres.conf to be mended",
        )
    longest = max(resources.time_limit_minutes for _, resources in cluster.resources)
    allowed = max(_minutes(row[3]) for row in fitting)
    yield Finding(
        "time limits",
        longest <= allowed,
        f"{allowed:g} minutes in the partition, {longest} asked for",
        "lower cluster.resources.*.time_limit_minutes, or choose another partition",
    )
    limit, asked = largest_array(), cluster.slurm.max_array_size
    if limit is not None and asked is not None:
        yield Finding(
            "array size",
            asked < limit,
            f"MaxArraySize is {limit}, cluster.slurm.max_array_size {asked}",
            f"set cluster.slurm.max_array_size to {limit - 1} or less, or to null",
        )


def _examine_nodes(cluster: Cluster, scratch: Path, patience: float) -> Iterator[Finding]:
    token = scratch / "token"
    token.write_text(uuid.uuid4().hex)
    kinds: dict[str, tuple[str, ...]] = {"influence": _TRAINING, "training": _TRAINING}
    if cluster.resources.teacher_update != cluster.resources.training:
        kinds["teacher_update"] = _TRAINING
    if cluster.generation_python is not None:
        kinds["generation"] = _GENERATION
    ranges = declared(["train"])
    for kind, packages in kinds.items():
        resources: Resources = getattr(cluster.resources, kind)
        python = cluster.generation_python if kind == "generation" else None
        stage = Stage(
            program="look-around",
            version=1,
            entry="cluster.doctor_jobs:open_node_report",
            settings={"packages": {name: ranges.get(name, "") for name in packages}},
            inputs={"token": token},
            input_hashes={},
            folder=scratch / kind,
            suffix=".json",
        )
        one = resources.model_copy(update={"nodes": 1, "processes_per_node": 1, "infrastructure_retries": 0})
        outcome = _try(stage, one, cluster, patience, _UNSTARTED, python)
        if isinstance(outcome, Finding):
            yield outcome
            return
        yield from _judge(kind, outcome, token.read_text(), resources)
    nodes = 2 if cluster.profile == "slurm" else 1
    together = cluster.resources.training.model_copy(
        update={"nodes": nodes, "processes_per_node": 2 // nodes, "infrastructure_retries": 0}
    )
    stage = Stage("all-reduce", 1, "cluster.doctor_jobs:open_all_reduce", {}, {}, {}, scratch / "together", ".json")
    outcome = _try(stage, together, cluster, patience, _APART)
    if isinstance(outcome, Finding):
        yield outcome
        return
    yield Finding(
        f"all-reduce over {nodes} nodes" if nodes > 1 else "all-reduce of two processes",
        outcome["sum"] == 2.0,
        f"{outcome['processes']} processes, sum {outcome['sum']:g}",
        _APART,
    )


def _judge(kind: str, seen: dict[str, Any], token: str, resources: Resources) -> Iterator[Finding]:
    yield Finding(
        f"{kind} job: file system",
        seen["token"] == token,
        f"{seen['host']} and this host " + ("see the same files" if seen["token"] == token else "see different files"),
        "put --run-root on a file system that all nodes share",
    )
    versions = ", ".join(f"{name} {number}" for name, number in list(seen["versions"].items())[:4])
    yield Finding(
        f"{kind} job: environment",
        not seen["wrong"],
        f"Python {seen['python']}, {versions}" + "".join(f"; {name}: {error}" for name, error in seen["wrong"].items()),
        "make install-generation VENV=... makes the environment that cluster.generation_python is to name"
        if kind == "generation"
        else "pip install 'montessori[train]' into the environment that cluster.slurm.python names",
    )
    if resources.gpus_per_node:
        yield Finding(
            f"{kind} job: GPUs",
            seen["gpus"] >= resources.gpus_per_node,
            f"torch sees {seen['gpus']} of {resources.gpus_per_node}",
            "install torch's CUDA build for the nodes' driver, and see that jobs get their GPUs (gres, cgroups)",
        )


def _try(
    stage: Stage, resources: Resources, cluster: Cluster, patience: float, remedy: str, python: str | None = None
) -> dict[str, Any] | Finding:
    """What the probe wrote, or why it wrote nothing."""
    deadline = time.monotonic() + patience

    def look(progress: Progress) -> None:
        if time.monotonic() > deadline:
            raise _TooLong

    name = stage.name.removeprefix("doctor-") + " job"
    try:
        (part,) = fan_out(stage, Shards(Rows.of([{"probe": 1}]), 1), resources, cluster, look, python)
    except _TooLong:
        return Finding(
            name,
            False,
            f"no result within {patience:.0f} s; its jobs were cancelled",
            "the queue may be full (squeue --start), or nothing satisfies cluster.resources; give --patience more seconds",
        )
    except ShardsFailed as error:
        failure = error.failures[0]
        log = Path(failure.log)
        lines = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        return Finding(name, False, f"{failure.kind}: {failure.error} {' '.join(lines)}", remedy)
    except UserError as error:
        return Finding(name, False, str(error), "see cluster.slurm and cluster.resources")
    found: dict[str, Any] = read_json(part)
    return found


def _minutes(limit: str) -> float:
    """A time as sinfo writes it: infinite, or [days-][hours:]minutes:seconds."""
    if limit in ("infinite", "n/a"):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = ["0", "0", *clock.split(":")][-3:]
    return 1440 * int(days or 0) + 60 * int(hours) + int(minutes) + int(seconds) / 60


def _gpus(gres: str) -> int:
    """GPUs of a node, from what Slurm says of its generic resources, e.g. gpu:h100:8(S:0-1),nvme:1."""
    return sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
