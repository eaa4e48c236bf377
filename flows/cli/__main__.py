"""Run the command `montessori` as `python -m flows.cli`."""

from flows.cli import main

main()
