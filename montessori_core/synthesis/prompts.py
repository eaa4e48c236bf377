"""The teacher's prompt p: a request and eight demonstrations (Section 4, Figure 13)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from montessori_core.config import Synthesis
from montessori_core.data.sources import Task
from montessori_core.seeding import seed_of
from montessori_core.synthesis.paper_request import PAPER_REQUEST

OPEN, CLOSE = "<instruction>", "</instruction>"
_MAX_REPETITION_PENALTY = 1.2

_REQUEST = """\
You write tasks that teach an assistant. Read the example tasks below, then write one new task of your own.

What makes a good task:
- It differs from every example in topic and in what it asks for.
- It is a single request, clear enough to be answered without a question back.
- Everything needed to answer it is part of the task.
- It can be answered in text alone, without images, files, tools or the web.
- It is one to three sentences long, in {language}.

Example tasks:
{demonstrations}

Write only the new task, between {open} and {close}."""

_LIST = """\
A collection of varied tasks for an assistant. Every task is different from all others, clear, complete in itself, and \
can be answered in text alone.

{demonstrations}"""
_LIST_IN = _LIST.replace("text alone.", "text alone. All tasks are in {language}.")


@dataclass(frozen=True)
class Prompt:
    """A prompt before the chat template: its id, its demonstrations, and its text."""

    id: str
    demonstrations: tuple[Task, ...]
    text: str


def check_decoding(settings: Synthesis) -> list[str]:
    """Return a warning if the repetition penalty suppresses the tag that an instruction must end with."""
    penalty = settings.instruction.repetition_penalty
    if penalty <= _MAX_REPETITION_PENALTY:
        return []
    return [
        f"synthesis.instruction.repetition_penalty is {penalty:g}: it also counts the prompt, which has {CLOSE} after every "
        f"demonstration; few outputs will have one and be accepted. Set it to {_MAX_REPETITION_PENALTY:g} or less"
    ]


def build_prompts(
    count: int,
    style: str,
    settings: Synthesis,
    seed_pool: Sequence[Task],
    synthetic_pool: Sequence[Task],
    seed: int,
    first: int = 0,
) -> list[Prompt]:
    """Build the prompts with numbers `first` to `first + count - 1`, each with its own random generator.

    If there are too few synthetic tasks, seed tasks replace them. Demonstrations are shuffled. A prompt depends only on its
    number, so a longer list starts with the shorter one.
    """
    prompts = []
    for number in range(first, first + count):
        generator = random.Random(seed_of(seed, "prompt", number))
        synthetic = generator.sample(synthetic_pool, min(settings.synthetic_demonstrations, len(synthetic_pool)))
        total = settings.seed_demonstrations + settings.synthetic_demonstrations
        demonstrations = synthetic + generator.sample(seed_pool, total - len(synthetic))
        generator.shuffle(demonstrations)
        prompts.append(Prompt(f"p{number:06d}", tuple(demonstrations), _render(style, settings, demonstrations)))
    return prompts


def _render(style: str, settings: Synthesis, demonstrations: Sequence[Task]) -> str:
    texts = [f"{OPEN}{task.instruction}{CLOSE}" for task in demonstrations]
    if style == "completion":
        template = settings.completion_prompt
        if template == "own":
            template = _LIST if settings.in_english else _LIST_IN
        template += f"{settings.separator}{{open}}"
    else:
        template = {"own": _REQUEST, "paper": f"{PAPER_REQUEST}{{demonstrations}}\n"}.get(
            settings.request, settings.request
        )
    # str.replace, not str.format: texts may contain braces. Demonstrations last: theirs stay.
    filled = template.replace("{open}", OPEN).replace("{close}", CLOSE).replace("{language}", settings.language)
    return filled.replace("{demonstrations}", settings.separator.join(texts))
