"""The strategy `self_instruct` (Section 4, Figure 13): eight demonstrations; the teacher writes another task."""

from montessori_core.config import SelfInstructStrategy
from montessori_core.synthesis.paper_request import PAPER_REQUEST
from montessori_core.synthesis.prompts import CLOSE, OPEN
from montessori_core.synthesis.strategies.strategy import Draft, Draw, Material, Strategy, Write

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


def _open(settings: SelfInstructStrategy, material: Material) -> Write:
    synthesis = material.settings
    template = material.template(_REQUEST, _LIST if synthesis.in_english else _LIST_IN)
    if template == "paper":
        template = f"{PAPER_REQUEST}{{demonstrations}}\n"

    def write(draw: Draw) -> Draft:
        """Show random seeds and synthetic tasks, shuffled; seeds replace missing synthetic ones."""
        count = min(synthesis.synthetic_demonstrations, len(material.synthetic))
        synthetic = draw.generator.sample(material.synthetic, count)
        total = synthesis.seed_demonstrations + synthesis.synthetic_demonstrations
        shown = synthetic + draw.generator.sample(material.seeds, total - len(synthetic))
        draw.generator.shuffle(shown)
        texts = synthesis.separator.join(f"{OPEN}{task.instruction}{CLOSE}" for task in shown)
        return Draft(material.ask(template, draw, {"demonstrations": texts}), tuple(shown))

    return write


SELF_INSTRUCT = Strategy(
    "self_instruct", "Another task than the demonstrations, which are seeds and earlier tasks (the paper).", _open,
    SelfInstructStrategy,
)  # fmt: skip
