"""Fast log-probabilities for TRL's trainers equal TRL's."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RecurrentGemmaConfig,
)
from trl.trainer.utils import add_fused_lm_head

from montessori_core.errors import UserError
from montessori_core.models.chat import IGNORED
from montessori_core.training.scoring import pack_pairs, speed_up_scoring

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")


def pairs(prompts: tuple[int, ...] = (5, 1, 30), outputs: tuple[int, ...] = (4, 9, 1, 7, 2, 12)) -> dict[str, Any]:
    """Return a batch like TRL's collator: chosen sequences, then rejected ones, padded on the right."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, 101, (count,), generator=draw)

    shared = [tokens(length) for length in prompts]
    sequences = [(shared[row % len(prompts)], tokens(length)) for row, length in enumerate(outputs)]
    width = max(len(prompt) + len(output) for prompt, output in sequences)
    ids = torch.zeros(len(outputs), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, output) in enumerate(sequences):
        length = len(prompt) + len(output)
        ids[row, :length] = torch.cat([prompt, output])
        mask[row, :length] = 1
        labels[row, len(prompt) : length] = output
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scores(model: Any, batch: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Return the model's output, and the gradient of a sum with different weights for all sequences."""
    model.zero_grad()
    output = model(**batch, use_cache=False, fused_lm_head=True)
    weights = torch.linspace(1, 2, len(output.log_probs))[:, None]
    (output.log_probs * weights).sum().backward()
    return output, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def make(kind: str) -> Any:
    torch.manual_seed(0)
    model: Any
    if kind == "mamba":
        model = MambaForCausalLM(MambaConfig(**SIZES, state_size=4))
    elif kind == "sliding window":
        model = MistralForCausalLM(MistralConfig(**ATTENTION, sliding_window=8))
    else:
        model = LlamaForCausalLM(LlamaConfig(**ATTENTION, tie_word_embeddings=kind == "tied"))
    add_fused_lm_head(model, outputs=FIELDS[:-1])
    if kind == "adapter":
        # Not a new adapter, which changes nothing.
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model


@pytest.mark.parametrize("shared", [False, True], ids=["rows", "pairs"])
@pytest.mark.parametrize("kind", ["tied", "untied", "adapter", "sliding window", "mamba"])
def test_scores_and_gradients_equal_trl(kind: str, shared: bool) -> None:
    batch = pairs()
    expected, expected_gradient = scores(make(kind), batch)
    model = make(kind)
    speed_up_scoring(model, pairs=shared)
    output, gradient = scores(model, batch)
    for name in FIELDS:
        assert torch.allclose(getattr(output, name).float(), getattr(expected, name).float(), atol=1e-5), name
    assert torch.allclose(output.loss, expected.loss, atol=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_scores_without_adapter_equal_base_model() -> None:
    """DPO's reference is the model without its adapter, after a batch with it."""
    base, model, batch = make("untied"), make("adapter"), pairs()
    for scored in (base, model):
        speed_up_scoring(scored, pairs=True)
    expected = base(**batch, fused_lm_head=True).log_probs
    adapted = model(**batch, fused_lm_head=True).log_probs
    with model.disable_adapter():
        reference = model(**batch, fused_lm_head=True).log_probs
    assert torch.equal(reference, expected)
    assert (adapted - expected).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "reads"), [("tied", 3), ("adapter", 3), ("mamba", 6)])
def test_pairs_read_prompt_once_if_masks_allow(kind: str, reads: int) -> None:
    model = make(kind)
    speed_up_scoring(model, pairs=True)
    scores(model, pairs())
    rows: list[int] = []
    causal_lm = model.get_base_model() if kind == "adapter" else model
    causal_lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scores(model, pairs())
    assert rows == [reads]


@pytest.mark.parametrize("error", [RuntimeError("no such mask"), torch.OutOfMemoryError("CUDA out of memory")])
def test_only_unsupported_masks_are_read_twice(error: RuntimeError) -> None:
    """A process that ran out of memory must end: others may wait for it."""
    model = make("tied")
    speed_up_scoring(model, pairs=True)

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            raise error

    model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            scores(model, pairs())
    else:
        expected, _ = scores(make("tied"), pairs())
        assert torch.allclose(scores(model, pairs())[0].log_probs, expected.log_probs, atol=1e-5)


def test_packed_rows_have_prompt_and_two_outputs() -> None:
    batch = pairs((3,), (2, 4))
    packed = pack_pairs(**batch, dtype=torch.float32)
    chosen, rejected = batch["input_ids"]
    assert packed.input_ids.tolist() == [[*chosen[:5].tolist(), *rejected[2:7].tolist()]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 6]]
    seen = (packed.attention_mask[0, 0] == 0).int().tolist()
    assert seen[4] == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]  # the chosen output: prompt and itself
    assert seen[5] == [1, 1, 0, 0, 0, 1, 0, 0, 0, 0]  # the repeated token: the tokens before the original, and itself
    assert seen[7] == [1, 1, 1, 0, 0, 0, 1, 1, 0, 0]  # the rejected output: prompt and itself
    assert packed.scored.tolist() == [[-1, -1, 2, 3, -1, -1], [-1, -1, 5, 6, 7, 8]]


def test_pairs_without_outputs_have_zero_scores() -> None:
    """They pad the last batch of a teacher update; in one process it may have no other."""
    batch, padding = pairs((5, 2, 30), (4, 0, 1, 7, 0, 12)), pairs((2, 2), (0, 0, 0, 0))
    expected, expected_gradient = scores(make("tied"), batch)
    model = make("tied")
    speed_up_scoring(model, pairs=True)
    output, gradient = scores(model, batch)
    assert torch.allclose(output.log_probs, expected.log_probs, atol=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert not output.log_probs[[1, 4]].any()
    output, gradient = scores(model, padding)
    assert not output.log_probs.any()
    assert not gradient.any()


CHANGED_LOGITS = {
    "gemma2 caps": Gemma2Config(**ATTENTION, head_dim=8, final_logit_softcapping=3.0, initializer_range=0.3),
    "gemma3 caps": Gemma3TextConfig(**ATTENTION, head_dim=8, final_logit_softcapping=3.0, initializer_range=0.3),
    "cohere scales": CohereConfig(**ATTENTION, logit_scale=0.25, initializer_range=0.3),
    "granite divides": GraniteConfig(**ATTENTION, logits_scaling=8.0, initializer_range=0.3),
}


@pytest.mark.parametrize("shared", [False, True], ids=["rows", "pairs"])
@pytest.mark.parametrize("config", CHANGED_LOGITS.values(), ids=CHANGED_LOGITS.keys())
def test_loss_equals_models_own(config: Any, shared: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = model(**pairs()).loss
    add_fused_lm_head(model, outputs=FIELDS[:-1])
    speed_up_scoring(model, pairs=shared)
    assert torch.allclose(model(**pairs(), fused_lm_head=True).loss, expected, atol=1e-5)


def test_unknown_change_of_logits_is_refused() -> None:
    """TRL does not apply RecurrentGemma's soft cap, whose name differs from Gemma's."""
    torch.manual_seed(0)
    layers = {"block_types": ("recurrent", "attention"), "attention_window_size": 8, "lru_width": 32}
    model = AutoModelForCausalLM.from_config(RecurrentGemmaConfig(**ATTENTION, **layers, logits_soft_cap=0.1)).train()
    add_fused_lm_head(model)
    speed_up_scoring(model)
    with pytest.raises(UserError, match="RecurrentGemmaForCausalLM changes its logits"):
        model(**pairs(), fused_lm_head=True)
    assert model.training


def test_window_beyond_first_batch_is_detected() -> None:
    """The first batch fits into the sliding window."""
    layers = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16}
    config = GPTNeoConfig(vocab_size=101, hidden_size=32, max_position_embeddings=64, **layers)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = model(**pairs()).loss
    add_fused_lm_head(model)
    speed_up_scoring(model, pairs=True)
    model(**pairs((3,), (2, 4)), fused_lm_head=True)
    assert torch.allclose(model(**pairs(), fused_lm_head=True).loss, expected, atol=1e-6)
