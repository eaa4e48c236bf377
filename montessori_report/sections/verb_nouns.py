"""Root verbs of instructions and their direct objects, as in Self-Instruct (Figures 6 and 8 to 10).

spaCy and its pipeline are optional. The words come from a model and Plotly interprets markup, so only lemmas that consist of
letters are shown.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from montessori_report.figures import TEMPLATE, Figure

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Token

PARSER = "MONTESSORI_PARSER"
"""Environment variable: name or folder of the spaCy pipeline."""
PARSED = 2000
"""Number of instructions parsed per set, from the first."""
VERBS, OBJECTS = 20, 4
_MAX_LETTERS = 30  # longer words are not shown
REMEDY = (
    "Root verbs and objects of the instructions are not shown. They need spaCy and an English pipeline: "
    "pip install 'montessori[report]' && python -m spacy download en_core_web_sm."
)

Pair = tuple[str, str | None]


def open_parser() -> "Language | None":
    """Load the pipeline that `PARSER` names, by default en_core_web_sm; None if it or spaCy is not installed."""
    name = os.environ.get(PARSER, "en_core_web_sm")
    if not Path(name).is_dir() and not (name.isidentifier() and find_spec(name)):
        return None  # spaCy takes seconds to import
    try:
        import spacy

        return spacy.load(name, exclude=["ner"])
    except (ImportError, OSError):
        return None


def read_verbs(parser: "Language", instructions: Sequence[str]) -> list[Pair]:
    """Return root verb and direct object of the first `PARSED` instructions; those without a verb are omitted."""
    pairs = (verb_and_object(parsed) for parsed in parser.pipe(instructions[:PARSED], batch_size=64))
    return [pair for pair in pairs if pair is not None]


def verb_and_object(instruction: "Doc") -> Pair | None:
    """Return the lemmas of the first sentence's root verb and its first direct object.

    If the root is not a verb ("Please, write ..."), the first verb below it counts.

    Returns:
        The verb, and its object if it has one; None without a verb.
    """
    sentence = next(iter(instruction.sents), None)
    if sentence is None:
        return None
    for token in _breadth_first(sentence.root):
        verb = _lemma(token) if token.pos_ == "VERB" else None
        if verb is not None:
            objects = (_lemma(child) for child in token.children if child.dep_ in ("dobj", "obj"))
            return verb, next((lemma for lemma in objects if lemma is not None), None)
    return None


def sunburst_figure(label: str, pairs: Iterable[Pair], instructions: int) -> Figure:
    """Draw the most common root verbs, each with its most common objects.

    Args:
        label: name of the set of instructions.
        pairs: result of `read_verbs`.
        instructions: number of parsed instructions.
    """
    by_verb: dict[str, Counter[str]] = {}
    totals: Counter[str] = Counter()
    for verb, noun in pairs:
        totals[verb] += 1
        by_verb.setdefault(verb, Counter()).update([noun] if noun else [])
    verbs = _most_common(totals, VERBS)
    objects = [(verb, noun, number) for verb, _ in verbs for noun, number in _most_common(by_verb[verb], OBJECTS)]
    trace = go.Sunburst(
        branchvalues="total",
        sort=False,
        ids=[*(verb for verb, _ in verbs), *(f"{verb}/{noun}" for verb, noun, _ in objects)],
        labels=[*(verb for verb, _ in verbs), *(noun for _, noun, _ in objects)],
        parents=[*("" for _ in verbs), *(verb for verb, _, _ in objects)],
        values=[*(number for _, number in verbs), *(number for _, _, number in objects)],
        insidetextorientation="radial",
        leaf_opacity=1,
        hovertemplate="%{id}: %{value:,} instructions<extra></extra>",
        marker_line_width=1,
    )
    with_verb = sum(totals.values())
    return Figure(
        f"Verbs and objects: {label}",
        f"Inner ring: the {len(verbs)} most common root verbs of the {with_verb:,} instructions that have one, of "
        f"{instructions:,} parsed. Outer ring: their {OBJECTS} most common direct objects; gaps are other or no objects. "
        "Many narrow sectors mean a diverse set.",
        go.Figure(trace, go.Layout(template=TEMPLATE, height=460)),
        ["verb", "object", "instructions"],
        [*((verb, None, number) for verb, number in verbs), *objects],
    )


def _breadth_first(root: "Token") -> Iterable["Token"]:
    """Yield a token and its descendants, breadth first."""
    level = [root]
    while level:
        yield from level
        level = list(chain.from_iterable(token.children for token in level))


def _lemma(token: "Token") -> str | None:
    """Return the lower-case lemma of a token, if it consists of at most `_MAX_LETTERS` letters."""
    lemma = (token.lemma_ or token.text).lower()
    return lemma if lemma.isalpha() and len(lemma) <= _MAX_LETTERS else None


def _most_common(counts: "Counter[str]", number: int) -> list[tuple[str, int]]:
    """Return the `number` most common words; ties in alphabetical order."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]
