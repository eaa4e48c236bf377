"""The strategy `grounded`: tasks about passages of the user's documents.

The answerer sees a task's passage, so that the response is right; the student sees the task alone, and learns what the
documents say.
"""

from montessori_core.config import GroundedStrategy
from montessori_core.data.documents import read_passages
from montessori_core.data.sources import Task
from montessori_core.synthesis.strategies.strategy import Draft, Draw, Material, Strategy, Write

_REQUEST = """\
You write tasks that teach an assistant what a text says. Read the text below, then write one task about it.

What makes a good task:
- The text has all that is needed to answer it.
- It can be understood without the text: it names what it asks about, and does not mention a text or passage.
- It is a single request, clear enough to be answered without a question back.
- It is one to three sentences long, in {language}.

The text:
{passage}

Write only the task, between {open} and {close}."""

_LIST = """\
Texts, and a question in {language} about each. Every question can be understood without its text.

Text: The river Spree rises in Saxony and flows through Berlin, where it joins the Havel. It is about 400 kilometres long.
Question: {open}Into which river does the Spree flow, and in which city?{close}

Text: To reset the pump, hold the green button for five seconds. The lamp then blinks twice.
Question: {open}How do you reset the pump, and how do you see that it worked?{close}

Text: {passage}
Question:"""


def _read(settings: GroundedStrategy) -> list[Task]:
    return read_passages(settings.documents, settings.passage_words)


def _open(settings: GroundedStrategy, material: Material) -> Write:
    template = material.template(_REQUEST, _LIST)

    def write(draw: Draw) -> Draft:
        passage = draw.generator.choice(material.passages)
        text = material.ask(template, draw, {"passage": passage.instruction})
        return Draft(text, (passage,), passage.instruction)

    return write


GROUNDED = Strategy(
    "grounded", "A task about a passage of your documents; the answer is written with the passage in sight.", _open,
    GroundedStrategy, _read,
)  # fmt: skip
