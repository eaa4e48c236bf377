"""The strategy `evolve`: the teacher rewrites a seed (Evol-Instruct: Xu et al., "WizardLM", ICLR 2024)."""

from montessori_core.config import EvolveStrategy
from montessori_core.synthesis.strategies.strategy import Draft, Draw, Material, Strategy, Write

_REQUEST = """\
You write tasks that teach an assistant. Below is a task. Rewrite it into a new task that {change}.

What makes a good task:
- It can be understood without the given task, and does not mention it.
- It is a single request, clear enough to be answered without a question back.
- It can be answered in text alone, without images, files, tools or the web.
- It is one to three sentences long, in {language}.

The given task:
{task}

Write only the new task, between {open} and {close}."""

_LIST = """\
Tasks for an assistant in {language}, and a variation of each: a task that {change}. Every variation is clear, complete in \
itself, and can be answered in text alone.

Task: Name three rivers in Europe.
Variation: {open}Name three rivers that flow through at least two countries, and say which countries these are.{close}

Task: Write a function that adds two numbers.
Variation: {open}Write a function that adds the even numbers of a list and returns 0 for an empty list.{close}

Task: Why do leaves change colour?
Variation: {open}A maple in a cold garden turns red two weeks before one by a warm wall. Explain the difference.{close}

Task: {task}
Variation:"""


def _open(settings: EvolveStrategy, material: Material) -> Write:
    template = material.template(_REQUEST, _LIST)

    def write(draw: Draw) -> Draft:
        seed = draw.generator.choice(material.seeds)
        values = {"task": seed.instruction, "change": draw.generator.choice(settings.changes)}
        return Draft(material.ask(template, draw, values), (seed,))

    return write


EVOLVE = Strategy("evolve", "A seed rewritten: harder, more specific, or in another field.", _open, EvolveStrategy)
