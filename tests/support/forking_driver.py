"""The lean driver with local jobs that are forked from a process which has opened the worker's libraries.

As a program, `python tests/forking_driver.py ARGUMENTS` is `montessori ARGUMENTS`. What a job computes is the same; it
saves the seconds in which a new interpreter imports torch and transformers. For tests of what dozens of jobs compute:
how jobs are started, found and killed is for tests that start them as users do.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from lean_driver import become_lean

from cluster.backends import LocalBackend, Task
from cluster.worker import run_task

_OPENED = ("torch", "transformers.models.llama.modeling_llama", "cluster.worker", "montessori_core.models")
_FORKING = multiprocessing.get_context("forkserver")


class ForkingBackend(LocalBackend):
    """Jobs of one process each; those of several are started as ever."""

    def submit(
        self, name: str, folder: Path, tasks: Sequence[Task], stage_folder: Path, at_once: int, avoid: frozenset[str]
    ) -> list[str]:
        """See `Backend.submit`."""
        if self._resources.processes_per_node > 1:
            return super().submit(name, folder, tasks, stage_folder, at_once, avoid)
        ids = []
        for task in tasks:
            process = _FORKING.Process(
                target=_work, args=(folder, str(stage_folder), task, self._resources.cpus_per_process)
            )
            process.start()
            ids.append(f"{process.pid}:{psutil.Process(process.pid).create_time()}")
        self._known.update(ids)
        return ids


def _work(folder: Path, stage_folder: str, task: Task, threads: int) -> None:
    import torch

    folder.mkdir(exist_ok=True)
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{os.getpid()}_0_log.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    numbers = {"JOB_ID": os.getpid(), "NTASKS": 1, "JOB_NUM_NODES": 1, "NODEID": 0, "GLOBALID": 0, "LOCALID": 0}
    os.environ |= {f"SUBMITIT_LOCAL_{name}": str(number) for name, number in numbers.items()}
    os.environ |= {"SUBMITIT_EXECUTOR": "local", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(threads)  # torch is there already, and does not ask for OMP_NUM_THREADS any more
    run_task(stage_folder, task, threads)


if __name__ == "__main__":
    become_lean()
    import cluster.backends
    from flows.cli import main

    _FORKING.set_forkserver_preload(list(_OPENED))
    cluster.backends.LocalBackend = ForkingBackend  # type: ignore[misc]
    sys.argv[0] = "montessori"
    main()
