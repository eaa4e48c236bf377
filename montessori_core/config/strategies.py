"""The strategies of `synthesis.strategy`: how the teacher's prompts are made."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from montessori_core.config.named import OWN, NamesAlone, read_named, tag_of
from montessori_core.config.section import Section

_NAME = "Name of the strategy."
PLACEHOLDERS = {"self_instruct": "demonstrations", "evolve": "task", "grounded": "passage"}
"""What the text of a prompt must have a place for, by the strategy whose prompt it is."""


class SelfInstructStrategy(Section):
    """The paper's: demonstrations from the seed pool and earlier tasks; the teacher writes another one."""

    name: Literal["self_instruct"] = Field("self_instruct", description=_NAME)


class EvolveStrategy(Section):
    """A seed is rewritten: the teacher makes it harder, more specific, or its own variation (Evol-Instruct)."""

    name: Literal["evolve"] = Field("evolve", description=_NAME)
    changes: tuple[str, ...] = Field(
        (
            "needs one more step of reasoning",
            "has one more requirement that an answer must meet",
            "asks about a concrete case in place of a general one",
            "asks for something rarer in the same field",
            "asks for the same skill in another field",
        ),
        min_length=1,
        description="What the rewritten task does that the seed does not; each prompt asks for one of them, at random. "
        "Each completes the sentence 'a task that ...'.",
    )


class GroundedStrategy(Section):
    """Tasks about passages of your documents. The model that answers sees the passage; the student does not."""

    name: Literal["grounded"] = Field("grounded", description=_NAME)
    documents: str = Field(
        min_length=1,
        description="A document (.txt, .md, .markdown, or .pdf with the extra 'documents'), or a folder or glob of them. "
        "Passages are copied into the run at its start.",
    )
    passage_words: int = Field(
        200,
        ge=20,
        description="Longest passage, words; in scripts without spaces a word is a character. Passages end at paragraphs "
        "where they can, and do not overlap.",
    )


class MagpieStrategy(Section):
    """The teacher gets nothing but the beginning of a user's turn and writes what a user would (Magpie, NOMAD)."""

    name: Literal["magpie"] = Field("magpie", description=_NAME)


class OwnStrategy(Section):
    """A strategy of your own, see strategies.md."""

    name: str = Field(
        pattern=r"^[\w.]+:\w+$",
        description="module:NAME of the strategy; the module is in a folder on the driver's PYTHONPATH.",
    )
    settings: dict[str, Any] = Field({}, description="Its settings; the strategy declares which.")


_NAMES = ("self_instruct", "evolve", "grounded", "magpie")

StrategySettings = Annotated[
    Annotated[SelfInstructStrategy, Tag("self_instruct")]
    | Annotated[EvolveStrategy, Tag("evolve")]
    | Annotated[GroundedStrategy, Tag("grounded")]
    | Annotated[MagpieStrategy, Tag("magpie")]
    | Annotated[OwnStrategy, Tag(OWN)],
    Discriminator(tag_of(_NAMES)),
    NamesAlone(),
    BeforeValidator(read_named("strategy", _NAMES)),
]
"""The settings of the strategy, found by its name."""
