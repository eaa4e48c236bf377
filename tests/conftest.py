"""Models, a browser and an order that the tests share. Models are real: SmolLM2-135M, and a Llama with part of its tokens."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would take the cores from other tests

# The same examples each time, however busy the machine is; with a seed of one's own, new ones.
settings.register_profile("suite", deadline=None, derandomize="MONTESSORI_TEST_SEED" not in os.environ)
settings.load_profile("suite")

ROOT = Path(__file__).parent.parent
_SLOWEST_FIRST = (
    "test_study",
    "test_prefect",
    "test_slurm",
    "test_run",
    "test_training",
    "test_benchmarks",
    "test_influence",
    "test_vllm",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, so that no process ends up with one of them while the others are idle."""
    places = {name: place for place, name in enumerate(_SLOWEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model, converted once and kept in the user's cache."""
    from montessori_core.models import fetch_embedded

    return fetch_embedded()


@pytest.fixture(scope="session")
def small_tokenizer(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer without its rarer tokens: a model of them is small enough for tests of whole runs."""
    folder = tmp_path_factory.mktemp("models") / "small-tokenizer"
    folder.mkdir()
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder)
    content = json.loads((smollm2 / "tokenizer.json").read_text())
    known = {token: number for token, number in content["model"]["vocab"].items() if number < 4096}
    content["model"]["vocab"] = known
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) in known]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def tiny_llama(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a third of a million parameters with random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
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
    return folder


@pytest.fixture(scope="session")
def talking_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, trained for a moment to answer prompts with tasks, so that most of its output passes the filters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from montessori_core.chat import IGNORED
    from montessori_core.config import DataSource, Synthesis
    from montessori_core.sources import read_tasks
    from montessori_core.synthesis.prompts import CLOSE, build_prompts

    folder = tmp_path_factory.mktemp("models") / "talking-llama"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    draw = random.Random(0)
    verbs = ["List", "Find", "Name", "Use", "Make", "Read", "Test", "Set"]
    things = ["water", "people", "food", "words", "books", "children", "energy", "ideas", "skills", "time", "stories"]
    pool = read_tasks(DataSource(path="builtin"), "seed_pool", with_response=False)
    shown = Synthesis(seed_demonstrations=2, synthetic_demonstrations=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for prompt in build_prompts(200, "completion", shown, pool, [], 0):
        task = f"{draw.choice(verbs)} {draw.randint(2, 99)} {draw.choice(things)} and {draw.choice(things)}.{CLOSE}"
        start, end = tokenizer(prompt.text)["input_ids"], tokenizer(task)["input_ids"]
        labels = [IGNORED] * len(start) + end
        model(input_ids=torch.tensor([start + end]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judging_llama(talking_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The talking Llama, trained for a moment to end what it is asked as a judge with a score, any score."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from montessori_core.chat import encode_example
    from montessori_core.judging import question_about

    folder = tmp_path_factory.mktemp("models") / "judging-llama"
    model = AutoModelForCausalLM.from_pretrained(talking_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(talking_llama)
    torch.manual_seed(0)
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        question = question_about(
            f"Count {draw.randint(2, 99)} birds.", f"{draw.randint(2, 99)} birds.", response_only=True
        )
        example = encode_example(tokenizer, question, f"Score: {draw.randint(1, 5)}", 1024)
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium. Without it, and without a way to install it, tests fail."""
    installation = subprocess.run([ROOT / "tests" / "install_chromium.sh"], capture_output=True, text=True)
    if installation.returncode:
        pytest.fail(f"these tests need Chromium:\n{installation.stderr.strip()}", pytrace=False)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield running
        running.close()
