"""Root verbs and their objects: from hand-built parses, and from a small spaCy pipeline."""

import random
from pathlib import Path

import pytest
import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from spacy.vocab import Vocab

from montessori_report.sections.verb_nouns import (
    OBJECTS,
    PARSER,
    VERBS,
    open_parser,
    read_verbs,
    sunburst_figure,
    verb_and_object,
)
from support.reports import page_of, write_run

VOCAB = Vocab()


def parsed(*tokens: tuple[str, int, str, str, str], second_sentence: int | None = None) -> Doc:
    """Return a parse of tokens (word, head, dependency, part of speech, lemma)."""
    words, heads, deps, pos, lemmas = (list(column) for column in zip(*tokens, strict=True))
    starts = [index in (0, second_sentence) for index in range(len(words))]
    return Doc(
        VOCAB,
        words=words,
        heads=heads,
        deps=deps,
        pos=pos,
        lemmas=lemmas,
        sent_starts=None if second_sentence is None else starts,
    )


WRITE_A_POEM = (
    ("Write", 0, "ROOT", "VERB", "write"),
    ("a", 2, "det", "DET", "a"),
    ("poem", 0, "dobj", "NOUN", "poem"),
)


def test_root_verb_and_first_object_are_lemmas() -> None:
    assert verb_and_object(parsed(*WRITE_A_POEM)) == ("write", "poem")
    lists = (
        ("Lists", 0, "ROOT", "VERB", "list"),
        ("Rivers", 0, "obj", "PROPN", "River"),
        ("seas", 0, "obj", "NOUN", "sea"),
    )
    assert verb_and_object(parsed(*lists)) == ("list", "river")


def test_verbs_are_from_first_sentence() -> None:
    second = (("Then", 4, "advmod", "ADV", "then"), ("rest", 4, "ROOT", "VERB", "rest"))
    assert verb_and_object(parsed(*WRITE_A_POEM, *second, second_sentence=3)) == ("write", "poem")
    only = (("Then", 1, "advmod", "ADV", "then"), ("rest", 1, "ROOT", "VERB", "rest"))
    after = (("Write", 2, "ROOT", "VERB", "write"), ("poems", 2, "dobj", "NOUN", "poem"))
    assert verb_and_object(parsed(*only, *after, second_sentence=2)) == ("rest", None)


def test_non_verb_root_yields_nearest_verb() -> None:
    tokens = (
        ("Task", 0, "ROOT", "NOUN", "task"),
        ("that", 2, "nsubj", "PRON", "that"),
        ("asks", 0, "relcl", "VERB", "ask"),
        ("to", 4, "aux", "PART", "to"),
        ("sort", 2, "xcomp", "VERB", "sort"),
        ("lists", 4, "dobj", "NOUN", "list"),
    )
    assert verb_and_object(parsed(*tokens)) == ("ask", None)
    assert verb_and_object(parsed(("Poem", 0, "ROOT", "NOUN", "poem"))) is None
    assert verb_and_object(Doc(VOCAB, words=[])) is None


@pytest.mark.parametrize("word", ["<b>poem</b>", "x=1", "a&b", "{{7}}", "poem2", "w" * 31])
def test_unsafe_words_are_ignored(word: str) -> None:
    tokens = (("Write", 0, "ROOT", "VERB", "write"), (word, 0, "dobj", "NOUN", word))
    assert verb_and_object(parsed(*tokens)) == ("write", None)
    assert verb_and_object(parsed((word, 0, "ROOT", "VERB", word))) is None


def test_sunburst_shows_most_common_and_adds_up() -> None:
    pairs = [
        (f"verb{'a' * v}", f"object{'b' * o}")
        for v in range(VERBS + 5)
        for o in range(OBJECTS + 2)
        for _ in range(v + o + 1)
    ]
    pairs.append(("rest", None))
    figure = sunburst_figure("a set", pairs, len(pairs))
    (trace,) = figure.plot["data"]
    ring = [index for index, parent in enumerate(trace["parents"]) if parent]
    assert len(trace["ids"]) == len(set(trace["ids"])) == VERBS * (1 + OBJECTS)
    values = dict(zip(trace["ids"], trace["values"], strict=True))
    for verb in {trace["parents"][index] for index in ring}:
        shown = [values[trace["ids"][index]] for index in ring if trace["parents"][index] == verb]
        assert shown == sorted(shown, reverse=True)
        assert sum(shown) < values[verb] == sum(found == verb for found, _ in pairs)
    assert min(value for name, value in values.items() if "/" not in name) > (OBJECTS + 2) * 3


SENTENCES = [
    (verb, thing, words, heads, deps, pos, lemmas)
    for verb in ("Write", "Explain", "Describe", "List")
    for thing in ("poem", "story", "recipe")
    for words, heads, deps, pos, lemmas in [
        (
            [verb, "a", "short", thing, "."],
            [0, 3, 3, 0, 0],
            ["ROOT", "det", "amod", "dobj", "punct"],
            ["VERB", "DET", "ADJ", "NOUN", "PUNCT"],
            [verb.lower(), "a", "short", thing, "."],
        )
    ]
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline trained for a few seconds on a dozen annotated sentences."""
    spacy.util.fix_random_seed(0)
    random_numbers = random.Random(0)
    language = spacy.blank("en")
    language.add_pipe("morphologizer")
    language.add_pipe("parser", config={"min_action_freq": 1})
    language.add_pipe("trainable_lemmatizer")
    examples = [
        Example.from_dict(
            language.make_doc(" ".join(words)),
            {"words": words, "heads": heads, "deps": deps, "pos": pos, "lemmas": lemmas, "morphs": [""] * len(words)},
        )
        for _, _, words, heads, deps, pos, lemmas in SENTENCES
    ]
    optimizer = language.initialize(lambda: examples)
    for _ in range(15):
        random_numbers.shuffle(examples)
        language.update(examples, sgd=optimizer)
    folder = tmp_path_factory.mktemp("parser") / "small"
    language.to_disk(folder)
    return folder


def test_report_has_parsed_instructions(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARSER, str(pipeline))
    parser = open_parser()
    assert isinstance(parser, Language)
    texts = [" ".join(words) for _, _, words, *_ in SENTENCES]
    assert read_verbs(parser, texts) == [(verb.lower(), thing) for verb, thing, *_ in SENTENCES]
    page = page_of(write_run(tmp_path / "run", texts=[*texts, "<img src=x onerror=alert(1)>"]))
    unmodified, updated = (plot["data"][0] for plot in page.plots if plot["data"][0]["type"] == "sunburst")
    assert {"write", "write/poem", "explain/recipe"} <= set(unmodified["ids"])
    assert unmodified["labels"] == updated["labels"]
    assert all(label.isalpha() for label in unmodified["labels"])
    assert "spacy download" not in page.text


@pytest.mark.parametrize("name", ["no_such_pipeline", "/no/such/folder", "no.such"])
def test_report_without_pipeline_explains_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(PARSER, name)
    page = page_of(write_run(tmp_path / "run"))
    assert "pip install 'montessori[report]' && python -m spacy download en_core_web_sm" in page.text
    assert not any(plot["data"][0]["type"] == "sunburst" for plot in page.plots)
    assert len(page.plots) > 10
