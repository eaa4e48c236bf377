"""`python -m flows.cli` is the command `montessori`."""

from flows.cli import main

main()
