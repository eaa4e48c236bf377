"""Rendezvous of a job's processes: rank 0 opens torch's TCPStore and writes its address to the shared file system.

The store listens before its port is published: another job on the node could take a port that is only reserved.
"""

import os
import time
from typing import Any

import submitit

from montessori_core.files import read_json, write_json

_TIMEOUT = 300.0  # seconds; the node of rank 0 may start last
_open_stores: list[Any] = []  # for as long as the process lives


def join_processes(environment: submitit.JobEnvironment) -> None:
    """Set the environment variables that torch.distributed reads; a job of one process has world size 1.

    Raises:
        TimeoutError: rank 0 did not write its address.
    """
    if environment.num_tasks == 1:
        _export("127.0.0.1", 0, environment)  # port 0: torch takes a free one
        return
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    # In the folder of the submission: ids of local jobs are process ids, so an earlier submission may have had the same.
    announcement = environment.paths.folder / f"rendezvous-{environment.job_id}-{attempt}.json"
    if environment.global_rank == 0:
        host = environment.hostname if environment.num_nodes > 1 else "127.0.0.1"
        write_json({"host": host, "port": _open_store(host)}, announcement)
    deadline = time.monotonic() + _TIMEOUT
    while (address := read_json(announcement)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 did not write {announcement} within {_TIMEOUT:.0f} s: did its node start?")
        time.sleep(0.1)
    _export(address["host"], address["port"], environment)
    # All ranks, 0 included, connect to the existing store, as with torchrun.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=attempt)


def _open_store(host: str) -> int:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # here: jobs of one process may have no torch

    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    _open_stores.append(store)
    return int(store.port)


def _export(host: str, port: int, environment: submitit.JobEnvironment) -> None:
    os.environ.update(
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(environment.num_tasks // environment.num_nodes),
    )
