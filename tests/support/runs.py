"""Runs of the tiny Llama through the command line, as users start them."""

import hashlib
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import psutil
import yaml

from flows import cli
from flows.cli.console import console, open_console
from montessori_core.files import read_json
from support import ROOT, wait_until

TABLES = ["instructions", "examples", "influence", "preferences", "training/instructions", "training/examples"]

DIES_WHILE_JOINING = """
import os, signal, sys
from pyarrow.parquet import ParquetWriter
write = ParquetWriter.write_table
def write_and_die(writer, *arguments, **options):
    write(writer, *arguments, **options)
    if ".influence.parquet" in str(writer.where):
        os.kill(os.getpid(), signal.SIGKILL)
ParquetWriter.write_table = write_and_die
sys.argv = ["montessori", "resume", sys.argv[1]]
from flows.cli import main
main()
"""
"""A program that resumes a run and is killed while it joins the influence table."""


def configuration(folder: Path, model: Path) -> Path:
    """Write a configuration with one iteration of the tiny Llama."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
    content = {
        "name": "tiny",
        "teacher": {"model": str(model), "prompt_style": "completion"},
        "student": {"model": str(model), "max_length": 192},
        "reference": {"path": "builtin", "limit": 6},
        "evaluation": {"path": "builtin", "limit": 4},
        "synthesis": {
            "instruction": sampling | {"max_tokens": 20},
            "response": sampling | {"max_tokens": 8},
            "seed_demonstrations": 2,
            "synthetic_demonstrations": 1,
            "prompts_per_shard": 8,
            "instructions_per_shard": 16,
            "max_rounds": 30,
            "oversampling": 2.0,
        },
        "warmup": {"examples": 4, "batch_size": 2, "learning_rate": 1e-3},
        "influence": {"probing_examples": 16, "examples_per_shard": 4, "later_probing_examples": 8},
        "preferences": {"baseline": "median"},
        "teacher_update": {"learning_rate": 1e-4, "epochs": 2},
        "training": {"examples": 6, "batch_size": 2, "learning_rate": 1e-3, "beta1": 0.8, "beta2": 0.99},
        "comparison": {"influence_examples": 4},
        "zero": {"stage": 0},
        "cluster": {"poll_seconds": 0.1},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def montessori(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return _start(["-m", "flows.cli", *arguments], cwd, environment)


def lean(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a command in the driver's environment, without the worker's libraries."""
    return _start([str(ROOT / "tests" / "support" / "lean_driver.py"), *arguments], cwd, environment)


def finish_lean(*arguments: str, cwd: Path, seconds: float = 600, **environment: str) -> str:
    """Run a command as `lean` does; return its output."""
    driver = lean(*arguments, cwd=cwd, **environment)
    output, _ = driver.communicate(timeout=seconds)
    assert driver.returncode == 0, output
    return output


def _start(command: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@contextmanager
def hangups_end_children() -> Iterator[None]:
    """Start children for which SIGHUP has its default action, although tests under nohup ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def call(*arguments: str, cwd: Path, seconds: float = 600, **environment: str) -> tuple[int, str]:
    process = montessori(*arguments, cwd=cwd, **environment)
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def invoke(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """Run a command in this process, which has all imports. For commands that run no flow.

    Working directory, environment, arguments and loggers are restored.
    """
    output, level = io.StringIO(), logging.getLogger("cluster").level
    with (
        chdir(cwd),
        patch.dict(os.environ, {"COLUMNS": "160"} | environment),
        patch.object(sys, "argv", ["montessori", *arguments]),
        patch.object(logging.getLogger("huggingface_hub"), "propagate", True),
        redirect_stdout(output),
        redirect_stderr(output),
        patch.dict(vars(console), vars(open_console())),
    ):
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), output.getvalue()
        finally:
            logging.getLogger("cluster").setLevel(level)
    return 0, output.getvalue()


def job_ids(stage: Path) -> list[str]:
    """Return the ids of the jobs that drivers have recorded for a stage."""
    entries = read_json(stage / "jobs" / "ledger.json") or []
    return [job for entry in entries for job in entry["ids"] or []]


def await_job(driver: subprocess.Popen[str], stage: Path) -> str:
    """Wait until a driver has recorded a job of a stage; return its id."""
    wait_until(lambda: job_ids(stage), 300, process=driver)
    return job_ids(stage)[-1]


def digests(run: Path) -> dict[str, str]:
    return {name: hashlib.sha256((run / "iteration-1" / f"{name}.parquet").read_bytes()).hexdigest() for name in TABLES}


def left_over(folder: Path) -> list[str]:
    """Return processes left by runs in `folder`, including Prefect's temporary servers."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
            continue
        try:
            command = " ".join(process.info["cmdline"] or [])
            if command and str(folder) in f"{process.cwd()} {command}":  # a process without a command is ending
                found.append(command)
        except psutil.Error:
            continue
    return found


def kill_everything(driver: subprocess.Popen[str], how: signal.Signals) -> None:
    """Kill the driver and, for SIGKILL, its jobs, but not Prefect's server, which must end by itself."""
    family = psutil.Process(driver.pid).children(recursive=True) if how is signal.SIGKILL else []
    driver.send_signal(how)
    for process in family:
        try:
            if any(module in " ".join(process.cmdline()) for module in ("submitit", "cluster.")):
                process.kill()
        except psutil.NoSuchProcess:
            continue
    driver.wait(90)
