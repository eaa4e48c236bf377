"""The command `strategies`."""

from flows.cli.filters import print_descriptions


def strategies() -> None:
    """List the strategies of prompts that synthesis.strategy can name."""
    from montessori_core.synthesis.strategies import REGISTRY

    print_descriptions({name: strategy.description for name, strategy in REGISTRY.items()})
