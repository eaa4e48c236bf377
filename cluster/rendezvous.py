"""How the processes of one job find each other: rank 0 takes a free port and says so on the shared file system."""

import os
import socket
import time
from pathlib import Path

import submitit

from montessori_core.atomic import read_json, write_json

_PATIENCE = 300.0  # seconds that ranks wait for rank 0, whose node may start last


def join_processes(environment: submitit.JobEnvironment, folder: Path) -> None:
    """Set the variables by which torch.distributed starts; a job of one process is a world of one.

    Raises:
        TimeoutError: rank 0 did not announce itself.
    """
    if environment.num_tasks == 1:
        _export("127.0.0.1", _free_port(), environment)
        return
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    announcement = folder / f"rendezvous-{environment.job_id}-{attempt}.json"
    if environment.global_rank == 0:
        host = environment.hostname if environment.num_nodes > 1 else "127.0.0.1"
        write_json({"host": host, "port": _free_port()}, announcement)
    deadline = time.monotonic() + _PATIENCE
    while (found := read_json(announcement)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 did not write {announcement} within {_PATIENCE:.0f} s: did its node start?")
        time.sleep(0.1)
    _export(found["host"], found["port"], environment)


def _export(host: str, port: int, environment: submitit.JobEnvironment) -> None:
    os.environ.update(
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(environment.num_tasks // environment.num_nodes),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
