"""The command `filters`."""

from collections.abc import Mapping

from flows.cli.console import console


def filters() -> None:
    """List the filters of instructions and examples that synthesis.filters can name."""
    from montessori_core.synthesis.filters import REGISTRY

    print_descriptions({name: filter.description for name, filter in REGISTRY.items()})


def print_descriptions(descriptions: Mapping[str, str]) -> None:
    """Print a line for each name."""
    width = max(map(len, descriptions))
    for name, description in descriptions.items():
        console.print(f"{name:<{width}}", style="bold", end=" ")
        console.print(description)
