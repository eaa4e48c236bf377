"""Where jobs run: processes of this machine, or Slurm. Both run jobs through submitit."""

import platform

from cluster.backends.base import Backend
from cluster.backends.local import LocalBackend
from cluster.backends.slurm import SlurmBackend
from montessori_core.config import Cluster, Resources


def open_backend(cluster: Cluster, resources: Resources, python: str | None) -> Backend:
    """The backend of the configured profile."""
    if cluster.profile == "slurm":
        return SlurmBackend(cluster, resources, python or cluster.slurm.python)
    return LocalBackend(resources, python)


def backend_at(host: str | None, cluster: Cluster) -> Backend | None:
    """The backend that reaches jobs which an earlier driver, perhaps of another profile, has submitted.

    Args:
        host: whose processes they are; None for jobs of Slurm.
        cluster: as configured now.

    Returns:
        None if they are processes of another host.
    """
    if host not in (None, platform.node()):
        return None
    if host is not None:
        return LocalBackend(Resources(), None)
    return open_backend(cluster.model_copy(update={"profile": "slurm"}), Resources(), None)
