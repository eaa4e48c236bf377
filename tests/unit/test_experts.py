"""Influence on a mixture of experts: experts that get no token of an example still take the step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from montessori_core.influence import AdamW, InfluenceMeter, ReferenceSet, ResidentStudent
from montessori_core.influence.losses import TokenLosses, example_loss, make_batch
from montessori_core.influence.projections import AlongDirections
from montessori_core.models.chat import IGNORED, Encoded
from montessori_core.training.moments import Moments

CPU = torch.device("cpu")
STEP = AdamW(1e-3, 0.9, 0.999, 1e-8, 0.1, 5)


class SeparateExperts(torch.nn.Module):
    """Mixtral's experts as separate weights, which have no gradient if no token is routed to them."""

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.gate_up = torch.nn.ParameterList(weight.detach().clone() for weight in stacked.gate_up_proj)
        self.down = torch.nn.ParameterList(weight.detach().clone() for weight in stacked.down_proj)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            tokens, places = torch.where(chosen == expert)
            gate, up = torch.nn.functional.linear(hidden[tokens], self.gate_up[expert]).chunk(2, dim=-1)
            output = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, self.down[expert])
            total = total.index_add(0, tokens, output * shares[tokens, places, None])
        return total


def student_of_experts(separate: bool) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=1,
        initializer_range=0.2,
    )
    model = MixtralForCausalLM(config)
    if separate:
        for layer in model.model.layers:
            layer.mlp.experts = SeparateExperts(layer.mlp.experts)
    return model.eval()


def examples(count: int, seed: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, 300, (8,), generator=generator).tolist() for _ in range(count)]
    return [Encoded(ids, [IGNORED] * 4 + ids[4:], False) for ids in made]


def warm_up(model: Any) -> torch.optim.AdamW:
    """Take four steps on batches that reach every expert."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)
    losses = TokenLosses(model)
    for seed in range(4):
        losses(make_batch(list(enumerate(examples(32, seed))), CPU)).mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("separate", [False, True])
def test_influence_moves_experts_without_tokens(separate: bool) -> None:
    """The step equals torch's AdamW with zero gradients for these experts; first order projects the same step."""
    model = student_of_experts(separate)
    optimizer = warm_up(model)
    moments = Moments(
        *(
            {name: optimizer.state[p][key].clone() for name, p in model.named_parameters()}
            for key in ("exp_avg", "exp_avg_sq")
        ),
        4,
    )
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    reference = ReferenceSet(examples(6, seed=8), 1024, CPU)
    (probed,) = examples(1, seed=9)

    losses = TokenLosses(model)
    before = reference.evaluate(losses).reduce("example")
    optimizer.zero_grad()
    example_loss(losses, make_batch([(0, probed)], CPU)).backward()
    unreached = [parameter for parameter in model.parameters() if parameter.grad is None]
    assert bool(unreached) is separate
    for parameter in unreached:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected = before - reference.evaluate(losses).reduce("example")

    model.load_state_dict(start)
    optimizer.zero_grad()
    student = ResidentStudent(model, moments, STEP, CPU)
    assert InfluenceMeter(student, reference).measure(probed).influence_student == pytest.approx(expected, abs=1e-7)

    direction = {name: torch.ones_like(parameter) for name, parameter in student.parameters.items()}
    still = ResidentStudent(model, moments, replace(STEP, weight_decay=0.0), CPU)
    still.take_step(make_batch([(0, probed)], CPU))
    moved = sum(float((p.detach() - start[name]).double().sum()) for name, p in still.parameters.items())
    still.restore()
    ((_, projections),) = still.project_steps([make_batch([(0, probed)], CPU)], AlongDirections([direction]))
    assert projections.tolist() == pytest.approx([moved], rel=1e-4)
