"""The linear layers of a model, which passes under autocast compute in bf16."""

import torch
from torch import nn


def parameters_of_linear_layers(model: nn.Module) -> list[nn.Parameter]:
    """Return weights and biases of linear layers, without tables that are also embeddings.

    None of a DoRA adapter, which also computes the norm of its weights, in fp32.
    """
    if any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        return []
    used = [(type(module) is nn.Linear, p) for module in model.modules() for p in module.parameters(recurse=False)]
    others = {id(parameter) for linear, parameter in used if not linear}
    return list({id(p): p for linear, p in used if linear and id(p) not in others}.values())


def cast_linear_layers_(model: nn.Module) -> None:
    """Cast linear layers to bf16. A pass under autocast, which would cast their weights itself, has the same result."""
    for parameter in parameters_of_linear_layers(model):
        parameter.data = parameter.data.to(torch.bfloat16)
