"""The command `filters`."""

from flows.cli.console import console


def filters() -> None:
    """List the filters of instructions that synthesis.filters can name."""
    from montessori_core.synthesis.filters import REGISTRY

    width = max(map(len, REGISTRY))
    for filter in REGISTRY.values():
        console.print(f"{filter.name:<{width}}", style="bold", end=" ")
        console.print(filter.description)
