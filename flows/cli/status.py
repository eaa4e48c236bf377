"""The command status."""

from flows.cli.console import console
from flows.cli.options import RunFolder


def status(run_dir: RunFolder) -> None:
    """Show the stages of a run: shards done, at work and failed."""
    from flows.cli.tables import print_status
    from tasks.run import reopen_run

    print_status(reopen_run(run_dir), console)
