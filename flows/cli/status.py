"""The command status."""

from flows.cli.options import RunFolder
from flows.cli.tables import print_status
from tasks.run import reopen_run


def status(run_dir: RunFolder) -> None:
    """Show the stages of a run: shards done, running and failed."""
    print_status(reopen_run(run_dir))
