"""Backends that run jobs through submitit: local processes, Slurm, and steps of an allocation or of held jobs."""

import platform
import shutil
from pathlib import Path

from cluster.backends.allocation import AllocationBackend
from cluster.backends.base import Backend
from cluster.backends.held import HeldBackend
from cluster.backends.local import LocalBackend
from cluster.backends.slurm import SlurmBackend
from montessori_core.config import Cluster, Resources
from montessori_core.errors import UserError


def open_backend(
    cluster: Cluster, resources: Resources, python: str | None, stage: str = "", driven: Path | None = None
) -> Backend:
    """Open the backend of the configured profile.

    Args:
        cluster: configuration.
        resources: of a job.
        python: interpreter of jobs that need another environment than the worker's.
        stage: name of the stage in `cluster.resources`, for its Slurm options; "": those of all stages.
        driven: folder of the driver, which may hold jobs between stages; None: no jobs are held.

    Raises:
        UserError: jobs cannot be started here.
    """
    slurm = cluster.slurm.of_stage(stage)
    if cluster.profile == "slurm" and slurm.hold is not None and driven is not None:
        return HeldBackend(slurm, slurm.hold, resources, python or slurm.python, driven)
    if cluster.profile == "slurm":
        sbatch = SlurmBackend(slurm, resources, python or slurm.python)
        sbatch.check()
        return sbatch
    if cluster.profile == "allocation":
        backend = AllocationBackend(slurm, resources, python or slurm.python)
        backend.check(stage)
        return backend
    return LocalBackend(resources, python)


def backend_at(host: str | None, steps: bool | None, cluster: Cluster) -> Backend | None:
    """Open the backend of jobs that an earlier driver submitted, possibly with another profile.

    Args:
        host: host of local jobs and of steps; None for Slurm jobs.
        steps: whether they are steps of a Slurm job; None: as the current profile starts them.
        cluster: current configuration.

    Returns:
        None if the jobs are processes of another host.

    Raises:
        UserError: they are Slurm jobs, and there is no Slurm here.
    """
    if host not in (None, platform.node()):
        return None
    if steps is None:
        steps = cluster.profile == "allocation" or (cluster.profile == "slurm" and cluster.slurm.hold is not None)
    if host is not None and steps:
        return AllocationBackend(cluster.slurm, Resources(), cluster.slurm.python)
    if host is not None:
        return LocalBackend(Resources(), None)
    if shutil.which("squeue") is None:
        raise UserError(
            "Slurm jobs of an earlier driver may be running, but there is no squeue here; start on a login node of their "
            "cluster. If they have ended, remove jobs/ledger.json in the folders of the run's stages; results are kept"
        )
    return SlurmBackend(cluster.slurm, Resources(), None)
