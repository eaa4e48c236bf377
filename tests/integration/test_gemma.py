"""Gemma 3 270M, a base model: converted as it was trained, and a student like any other.

Its licence has to be accepted by a person, so these tests download nothing: they run where the model was fetched.
"""

from pathlib import Path

import pytest
import torch

from cluster.fanout import fan_out
from cluster.stage import Stage
from montessori_core.config import Cluster, Resources, Warmup, Zero
from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.models.chat import encode_example
from montessori_core.models.embedded import embedded_folder, terms_to_accept
from montessori_core.models.load import load_model, load_tokenizer
from montessori_core.models.rendering import text_beginning
from montessori_core.programs import SFT, Sft
from montessori_core.training.moments import load_moments
from support.row_programs import as_shards

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SENTENCES = [
    "The sun rises in the east and sets in the west, and at night the stars come out.",
    "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to make sugar and oxygen.",
    "She opened the window because the room was too hot, and a cold wind blew her papers onto the floor.",
]
ROWS = [
    {"instruction": f"Count to {n}.", "response": " ".join(map(str, range(n + 2))), "response_finished": True}
    for n in (3, 5, 7, 9)
]


@pytest.fixture(scope="module")
def gemma() -> Path:
    if terms_to_accept("gemma3-270m"):
        pytest.skip("not fetched; accept its terms with: montessori model fetch gemma3-270m --accept-licence")
    return embedded_folder("gemma3-270m")


def test_gemma_predicts_english(gemma: Path) -> None:
    """2.6 nats per token; 17 if the norms' weights were stored with the one that the GGUF adds to them."""
    tokenizer, model = load_tokenizer("gemma3-270m"), load_model("gemma3-270m", torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert [n for n, kind in enumerate(model.config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(sentence)["input_ids"]]) for sentence in SENTENCES]
        assert sum(float(model(input_ids=text, labels=text).loss) for text in ids) / len(ids) < 3.0


def test_gemma_tokenizes_as_sentencepiece_does(gemma: Path) -> None:
    """The expected tokens are those of the sentencepiece library with the GGUF's own vocabulary and scores."""
    tokenizer = load_tokenizer(str(gemma))
    assert text_beginning(tokenizer) == "<bos>"
    assert tokenizer("Hello world")["input_ids"] == [2, 9259, 1902]
    for text, tokens in {
        "in 2024\n 17 + 3.14": ["in", "▁", "2", "0", "2", "4", "\n", "▁", "1", "7", "▁+", "▁", "3", ".", "1", "4"],
        "def f(x):\n    return": ["def", "▁f", "(", "x", "):", "\n", "▁▁▁▁", "return"],
        "two  spaces\n\n\nend": ["two", "▁▁", "spaces", "\n\n\n", "end"],
    }.items():
        assert tokenizer.tokenize(text) == tokens
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_gemma_is_warmed_up_and_measured(gemma: Path, tmp_path: Path) -> None:
    """Two steps of the warm-up, with the paper's template, then the influence of an example."""
    recipe = Warmup(learning_rate=1e-5, batch_size=2, micro_batch_size=2).shared()
    settings = Sft(max_length=128, lora=None, recipe=recipe, zero=Zero(), seed=0, save_moments=True)
    training = Stage.of(SFT, settings, tmp_path / "warmup", {"student": gemma}, {})
    (warm,) = fan_out(training, as_shards(ROWS), Resources(), Cluster())
    tokenizer, moments = load_tokenizer(str(warm)), load_moments(warm)
    assert moments.step == 2
    encoded = [encode_example(tokenizer, str(row["instruction"]), str(row["response"]), 128) for row in ROWS]
    assert all(example.input_ids.count(tokenizer.bos_token_id) == 1 for example in encoded)
    assert all(example.labels[-1] == tokenizer.eos_token_id for example in encoded)
    step = AdamW(1e-5, 0.9, 0.999, 1e-8, 0.0, moments.step + 1)
    student = ResidentStudent(load_model(str(warm), torch.float32), moments, step, CPU)
    meter = InfluenceMeter(student, ReferenceSet(encoded[:2], 256, CPU), "first_order")
    assert meter.measure(encoded[3]).influence_student > 0  # counting helps to count
