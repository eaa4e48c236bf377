"""The interface of a strategy: it makes the prompts that a teacher writes instructions from.

Every prompt gets several candidates (`synthesis.samples_per_prompt`), so that preference pairs and DPO work for each
strategy. Your own strategy is a module with a `Strategy`; name it in `synthesis.strategy` as `module:NAME`:

    from montessori_core.config import Section
    from montessori_core.synthesis.strategies.strategy import Draft, Draw, Material, Strategy, Write

    class Settings(Section):
        subjects: tuple[str, ...]

    def open_quiz(settings: Settings, material: Material) -> Write:
        def write(draw: Draw) -> Draft:
            subject = draw.generator.choice(settings.subjects)
            return Draft(material.ask(f"Write one quiz question about {subject}, between {{open}} and {{close}}."))

        return write

    QUIZ = Strategy("quiz", "Questions of a quiz.", open_quiz, Settings)

The driver builds the prompts, so jobs do not import the module. A prompt must depend on nothing but its draw, the settings
and the material: a resumed run builds it again.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from montessori_core.config import Section, Synthesis
from montessori_core.data.sources import Task
from montessori_core.programs import Form
from montessori_core.synthesis.extraction import close_output, extract_instruction
from montessori_core.synthesis.filtering import NO_TAGS
from montessori_core.synthesis.prompts import CLOSE, OPEN


@dataclass(frozen=True)
class Draft:
    """The text of a prompt before the chat template, and what it shows.

    Attributes:
        text: what the teacher reads.
        demonstrations: tasks or passages in the text; an instruction must not repeat them.
        passage: a text that the answerer sees before the instruction; the student never sees it.
    """

    text: str
    demonstrations: tuple[Task, ...] = ()
    passage: str = ""


@dataclass(frozen=True)
class Draw:
    """What decides a prompt.

    Attributes:
        generator: the prompt's own random numbers.
        topic, persona: of a random seed that has one; empty if none has.
    """

    generator: random.Random
    topic: str = ""
    persona: str = ""


@dataclass(frozen=True)
class Material:
    """What prompts are made of.

    Attributes:
        style: the teacher's prompt style, 'chat' or 'completion'.
        settings: the section `synthesis`.
        seeds: human-written tasks.
        synthetic: tasks of the last iteration.
        passages: passages of documents that the strategy has read.
    """

    style: str
    settings: Synthesis
    seeds: Sequence[Task]
    synthetic: Sequence[Task] = ()
    passages: Sequence[Task] = ()

    def ask(self, template: str, draw: Draw | None = None, values: Mapping[str, str] | None = None) -> str:
        """Fill a template; in completion style, the separator and an opening tag follow.

        Args:
            template: with the placeholders {language}, {open}, {close}, {topic}, {persona} and those of `values`. Other
                braces stay, and so do those of the values.
            draw: has topic and persona.
            values: by placeholder.
        """
        if self.style == "completion":
            template += f"{self.settings.separator}{{open}}"
        draw = draw or Draw(random.Random())
        common = {"open": OPEN, "close": CLOSE, "language": self.settings.language}
        replacements = {**common, "topic": draw.topic, "persona": draw.persona, **(values or {})}
        # One pass, not str.format: texts may contain braces and placeholders.
        return re.sub(rf"\{{({'|'.join(replacements)})\}}", lambda match: replacements[match[1]], template)

    def template(self, request: str, completion_prompt: str) -> str:
        """Return the text of the style: the configured one, or the strategy's own for 'own'."""
        if self.style == "completion":
            default, configured = completion_prompt, self.settings.completion_prompt
        else:
            default, configured = request, self.settings.request
        return default if configured == "own" else configured


Write = Callable[[Draw], Draft]
"""Returns the prompt of a draw."""


def tagged_form(style: str) -> Form:
    """Return how a teacher gets a prompt that asks for an instruction in tags."""
    return "tagged" if style == "completion" else "request"


def read_tagged(raw_output: str, finish_reason: str, material: Material) -> str | None:
    """Return the instruction in tags of an output; None if there is none."""
    if material.style == "completion":
        raw_output = close_output(raw_output, finish_reason)
    return extract_instruction(raw_output, material.style, material.settings.keep_newlines)


@dataclass(frozen=True)
class Strategy:
    """A way to ask a teacher for instructions.

    Attributes:
        name: name in the configuration.
        description: one line for the list of strategies.
        open: returns the function that writes prompts; called once per set of examples.
        settings: type that validates its settings; `Section` itself has none.
        read: reads the documents that its settings name, as passages; called when a run starts, which keeps a copy.
        form: how the teacher gets the text, by its prompt style.
        extract: returns the instruction of an output (raw output, finish reason, material), or None.
        missing: reason of a rejection without an instruction.
        chat_api: whether a teacher behind a chat API can be asked.
    """

    name: str
    description: str
    open: Callable[[Any, Material], Write]
    settings: type[Section] = Section
    read: Callable[[Any], list[Task]] | None = None
    form: Callable[[str], Form] = tagged_form
    extract: Callable[[str, str, Material], str | None] = read_tagged
    missing: str = NO_TAGS
    chat_api: bool = True
