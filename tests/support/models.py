"""Models of the tests: SmolLM2-135M, and a tiny Llama with some of its tokens.

They are built once per machine, in the user's cache; their names have a hash of this file and of the library versions.
"""

import fcntl
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from montessori_core.config import DataSource, Synthesis
from montessori_core.data.sources import read_tasks
from montessori_core.files import cache_root, commit
from montessori_core.models.embedded import fetch_embedded
from montessori_core.synthesis.nomad import ASSISTANT, USER
from montessori_core.synthesis.prompts import CLOSE, OPEN, Prompt
from support.generation import build_prompts

if TYPE_CHECKING:
    from montessori_core.models.chat import Encoded

_VERBS = ["List", "Find", "Name", "Use", "Make", "Read", "Test", "Set"]
_THINGS = ["water", "people", "food", "words", "books", "children", "energy", "ideas", "skills", "time", "stories"]


def _built(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of a model; build it if it does not exist."""
    recipe = Path(__file__).read_text() + version("torch") + version("transformers")
    folder = cache_root() / "tests" / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with commit(folder) as temporary:
                build(temporary)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model, converted once and kept in the user's cache."""
    return fetch_embedded()


@pytest.fixture(scope="session")
def small_tokenizer(smollm2: Path) -> Path:
    """SmolLM2's tokenizer without its rarer tokens, so that models are small enough to test full runs."""
    return _built("small-tokenizer", lambda folder: _write_small_tokenizer(smollm2, folder))


def _write_small_tokenizer(smollm2: Path, folder: Path) -> None:
    folder.mkdir()
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder)
    content = json.loads((smollm2 / "tokenizer.json").read_text())
    known = {token: number for token, number in content["model"]["vocab"].items() if number < 4096}
    content["model"]["vocab"] = known
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) in known]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def tiny_llama(small_tokenizer: Path) -> Path:
    """A Llama with random weights and a third of a million parameters."""
    return _built("tiny-llama", lambda folder: _write_tiny_llama(small_tokenizer, folder))


def _write_tiny_llama(small_tokenizer: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def talking_llama(tiny_llama: Path) -> Path:
    """The tiny Llama, trained briefly to answer prompts with tasks, so that most outputs pass the filters."""
    return _built("talking-llama", lambda folder: _train(tiny_llama, folder, _tasks_of_prompts))


def _tasks_of_prompts(tokenizer: Any) -> "Iterator[list[Encoded]]":
    from montessori_core.models.chat import IGNORED, Encoded

    draw = random.Random(0)
    shown = Synthesis(seed_demonstrations=2, synthetic_demonstrations=1)
    for prompt in _prompts(200, "completion", shown):
        task = f"{draw.choice(_VERBS)} {draw.randint(2, 99)} {draw.choice(_THINGS)} and {draw.choice(_THINGS)}.{CLOSE}"
        start, end = tokenizer(prompt.text)["input_ids"], tokenizer(task)["input_ids"]
        yield [Encoded(start + end, [IGNORED] * len(start) + end, truncated=False)]


@pytest.fixture(scope="session")
def explaining_llama(tiny_llama: Path) -> Path:
    """The tiny Llama, trained briefly to answer the paper's request: an explanation, then a tagged task."""
    return _built("explaining-llama", lambda folder: _train(tiny_llama, folder, _explained_tasks))


def _explained_tasks(tokenizer: Any) -> "Iterator[list[Encoded]]":
    from montessori_core.models.chat import encode_example

    draw = random.Random(0)
    for prompt in _prompts(150, "chat", Synthesis(request="paper")):
        task = f"{draw.choice(_VERBS)} {draw.randint(2, 99)} {draw.choice(_THINGS)} and {draw.choice(_THINGS)}."
        asked = encode_example(tokenizer, prompt.text, f"1. It helps.\n2. No input.\n3. {OPEN}{task}{CLOSE}", 2048)
        yield [asked, encode_example(tokenizer, task, f"They are {draw.choice(_THINGS)}.", 2048)]


@pytest.fixture(scope="session")
def asking_llama(talking_llama: Path) -> Path:
    """The talking Llama, trained briefly to write a user's turn after `User:`."""
    return _built("asking-llama", lambda folder: _train(talking_llama, folder, _user_turns))


def _user_turns(tokenizer: Any) -> "Iterator[list[Encoded]]":
    from montessori_core.models.chat import IGNORED, Encoded

    draw = random.Random(0)
    start = tokenizer(USER)["input_ids"]
    for _ in range(80):
        task = f" {draw.choice(_VERBS)} {draw.randint(2, 99)} {draw.choice(_THINGS)} and {draw.choice(_THINGS)}.{ASSISTANT}"
        end = tokenizer(task)["input_ids"]
        yield [Encoded(start + end, [IGNORED] * len(start) + end, truncated=False)]


@pytest.fixture(scope="session")
def judging_llama(talking_llama: Path) -> Path:
    """The talking Llama, trained briefly to end a judgement with a random score."""
    return _built("judging-llama", lambda folder: _train(talking_llama, folder, _judgements))


def _judgements(tokenizer: Any) -> "Iterator[list[Encoded]]":
    from montessori_core.judging.points import question_about
    from montessori_core.models.chat import encode_example

    draw = random.Random(0)
    for _ in range(60):
        question = question_about(
            f"Count {draw.randint(2, 99)} birds.", f"{draw.randint(2, 99)} birds.", response_only=True
        )
        yield [encode_example(tokenizer, question, f"Score: {draw.randint(1, 5)}", 1024)]


def _prompts(count: int, style: str, settings: Synthesis) -> list[Prompt]:
    pool = read_tasks(DataSource(path="builtin"), "seed_pool", with_response=False)
    return build_prompts(count, style, settings, pool, [], 0)


def _train(start: Path, folder: Path, steps: "Callable[[Any], Iterator[list[Encoded]]]") -> None:
    """Train a model on the examples of each step; their gradients add up."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(start)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for examples in steps(tokenizer):
        for example in examples:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
