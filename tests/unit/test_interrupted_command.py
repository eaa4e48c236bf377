"""Ctrl-C in a command that has no message of its own."""

import signal
import subprocess
import sys

from support import ROOT

COMMAND = """
import os, signal, sys, time
from flows import cli
@cli.app.command()
def wait():
    print("begun", flush=True)
    time.sleep(600)
sys.argv = ["montessori", "wait"]
cli.main()
"""


def test_interrupted_command_says_how_to_continue() -> None:
    command = subprocess.Popen([sys.executable, "-c", COMMAND], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stdout.readline() == "begun\n"
    command.send_signal(signal.SIGINT)
    output = command.communicate(timeout=60)[0]
    assert command.returncode == 128 + signal.SIGINT
    assert output.strip() == "interrupted; finished work is kept: the same command continues it"
