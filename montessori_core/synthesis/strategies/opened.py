"""Open the strategy of `synthesis.strategy`, and build prompts with it."""

import random
from collections.abc import Sequence
from typing import Any

from montessori_core.config import OwnStrategy, Section, Synthesis, parse
from montessori_core.data.sources import Task
from montessori_core.errors import ConfigError, UserError
from montessori_core.program import load
from montessori_core.programs import Form
from montessori_core.seeding import seed_of
from montessori_core.synthesis.filtering import short_error
from montessori_core.synthesis.prompts import Prompt
from montessori_core.synthesis.strategies import REGISTRY
from montessori_core.synthesis.strategies.strategy import Draft, Draw, Material, Strategy

_TRIED = 20  # prompts that are built before a run starts


class OpenStrategy:
    """A strategy with its settings and material.

    Attributes:
        strategy: the strategy.
        form: how the teacher gets the prompts.
    """

    def __init__(self, material: Material, about: Sequence[Task] | None = None) -> None:
        """Open the strategy of `material.settings`.

        Args:
            material: what prompts are made of.
            about: seeds whose topics and personas prompts name; by default those of the material.

        Raises:
            ConfigError: a custom strategy cannot be imported or opened, or its settings are not valid.
            UserError: a prompt names a topic or persona, and no seed has one.
        """
        self._label = material.settings.strategy.name
        self.strategy, settings = find_strategy(material.settings)
        try:
            self._write = self.strategy.open(settings, material)
        except UserError:
            raise
        except Exception as error:
            raise ConfigError(
                f"synthesis.strategy: {self._label} cannot be opened: {short_error(error)}; correct its settings or its "
                "module"
            ) from error
        self.form: Form = self.strategy.form(material.style)
        self._material = material
        seeds = material.seeds if about is None else about
        self._about: dict[str, list[str]] = {}
        for name in ("topic", "persona"):
            if values := [text for seed in seeds if (text := getattr(seed, name, ""))]:
                self._about[name] = values
            elif f"{{{name}}}" in material.template("", ""):
                raise UserError(
                    f"synthesis: the text of the prompt names {{{name}}}, but no seed of seed_pool.path has a column {name}; "
                    "add it to the seeds, or remove it from the text"
                )

    def prompts(self, count: int, seed: int, first: int = 0) -> list[Prompt]:
        """Build the prompts with numbers `first` to `first + count - 1`, each with its own random generator.

        A prompt depends only on its number, so a longer list starts with the shorter one.

        Raises:
            UserError: a custom strategy failed.
        """
        return [self._prompt(number, seed) for number in range(first, first + count)]

    def _prompt(self, number: int, seed: int) -> Prompt:
        about = {
            name: random.Random(seed_of(seed, name, number)).choice(values) for name, values in self._about.items()
        }
        draw = Draw(random.Random(seed_of(seed, "prompt", number)), **about)
        try:
            draft = self._write(draw)
        except Exception as error:
            if self._label in REGISTRY:
                raise
            raise UserError(
                f"synthesis.strategy: {self._label} failed with {short_error(error)} on prompt {number}; correct its module"
            ) from error
        if not isinstance(draft, Draft) or not isinstance(draft.text, str):
            raise UserError(
                f"synthesis.strategy: {self._label} gave {draft!r:.200} for a prompt; it must return a Draft"
            )
        return Prompt(f"p{number:06d}", draft.demonstrations, draft.text, draft.passage)

    def extract(self, raw_output: str, finish_reason: str) -> str | None:
        """Return the instruction of an output; None if there is none.

        Args:
            raw_output: what the teacher wrote.
            finish_reason: 'stop' or 'length'.
        """
        return self.strategy.extract(raw_output, finish_reason, self._material)


def find_strategy(settings: Synthesis) -> tuple[Strategy, Section]:
    """Return the strategy of `synthesis.strategy`, of the registry or by `module:NAME`, and its settings.

    Raises:
        ConfigError: no such strategy, or its settings are not valid.
    """
    entry = settings.strategy
    if not isinstance(entry, OwnStrategy):
        return REGISTRY[entry.name], entry
    try:
        strategy: Any = load(entry.name)
    except Exception as error:
        raise ConfigError(
            f"synthesis.strategy: {entry.name}: {short_error(error)}; the module must be importable where the driver runs: "
            "put its folder on PYTHONPATH"
        ) from error
    if not isinstance(strategy, Strategy):
        raise ConfigError(
            f"synthesis.strategy: {entry.name} is not a montessori_core.synthesis.strategies.strategy.Strategy"
        )
    return strategy, parse(strategy.settings, entry.settings, f"synthesis.strategy: {entry.name}: the mapping settings")


def read_documents(settings: Synthesis) -> list[Task]:
    """Return the passages of the strategy's documents; none if it reads no documents.

    Raises:
        UserError: they cannot be read.
    """
    strategy, section = find_strategy(settings)
    return strategy.read(section) if strategy.read else []


def check_strategy(settings: Synthesis, style: str, seeds: Sequence[Task], passages: Sequence[Task]) -> None:
    """Build a few prompts, so that a strategy that fails does so before any job.

    Raises:
        UserError: the strategy cannot be opened, or fails.
    """
    OpenStrategy(Material(style, settings, seeds, (), passages)).prompts(_TRIED, seed=0)
