"""The commands that list what a configuration or a study can name: filters, strategies, methods."""

from collections.abc import Mapping

from flows.cli.console import console


def filters() -> None:
    """List the filters of instructions and examples that synthesis.filters can name."""
    from montessori_core.synthesis.filters import REGISTRY

    _print({name: filter.description for name, filter in REGISTRY.items()})


def strategies() -> None:
    """List the strategies of prompts that synthesis.strategy can name."""
    from montessori_core.synthesis.strategies import REGISTRY

    _print({name: strategy.description for name, strategy in REGISTRY.items()})


def methods() -> None:
    """List the methods that a study can compare."""
    from flows.methods import REGISTRY

    _print({name: method.description for name, method in REGISTRY.items()})


def _print(descriptions: Mapping[str, str]) -> None:
    """Print a line for each name."""
    width = max(map(len, descriptions))
    for name, description in descriptions.items():
        console.print(f"{name:<{width}}", style="bold", end=" ")
        console.print(description)
