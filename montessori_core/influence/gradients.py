"""Gradients of single examples, kept as factors until a block of rows is needed.

The gradient of a linear layer's weight is the product of its output gradients and its inputs, dY^T X. For a short example
both factors are much smaller than the product. They are kept for several examples, so that AdamW's state is read once for
all of them, and a block of the product stays in the cache while it is used.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass
class FactoredGradient:
    """The gradient of one example with respect to one parameter: the sum of all terms, zero if there are none.

    Parameters are seen as matrices [rows, columns], where columns is the last dimension.

    Attributes:
        products: of each linear layer that uses the parameter, output gradients [tokens, rows] and inputs [tokens, columns].
        lookups: of each embedding layer that uses it, token ids in ascending order and output gradients [tokens, columns].
        dense: gradients of all other uses, [rows, columns].
    """

    products: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    lookups: list[tuple[list[int], torch.Tensor]] = field(default_factory=list)
    dense: list[torch.Tensor] = field(default_factory=list)

    def rows(self, start: int, stop: int, like: torch.Tensor) -> torch.Tensor:
        """Return rows `start` to `stop`, [rows, columns], with the device and dtype of `like`.

        Args:
            start, stop: range of rows.
            like: [rows, columns].
        """
        terms = [outputs[:, start:stop].t() @ inputs for outputs, inputs in self.products]
        terms += [gradient[start:stop] for gradient in self.dense]
        block = terms[0].to(like.dtype) if terms else torch.zeros_like(like)
        for term in terms[1:]:
            block = block + term
        for ids, outputs in self.lookups:
            first, last = bisect_left(ids, start), bisect_left(ids, stop)
            if first < last:
                places = torch.tensor(ids[first:last], device=block.device) - start
                block = block.index_add(0, places, outputs[first:last].to(block.dtype))
        return block


class GradientCapture(TorchFunctionMode):
    """Keep the factors of weight gradients instead of computing them, while the mode is active.

    Linear and embedding layers get a detached weight; a hook on their output keeps the factors in the backward pass. Autograd
    computes the gradients of all other uses as always, so that no use of a parameter is missed.

    Attributes:
        gradients: by parameter name, of each parameter with a linear or embedding layer.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self.gradients: dict[str, FactoredGradient] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        name = self._names.get(id(args[1])) if len(args) > 1 and torch.is_grad_enabled() else None
        if name is None or function not in (functional.linear, functional.embedding):
            return function(*args, **options)
        inputs, weight, *rest = args
        output = function(inputs, weight.detach(), *rest, **options)
        if not output.requires_grad:  # nothing before this layer is trained
            output.requires_grad_()
        gradient = self.gradients.setdefault(name, FactoredGradient())
        if function is functional.embedding:
            padding = options.get("padding_idx")
            output.register_hook(lambda outputs: gradient.lookups.append(_lookup(inputs, outputs, padding)))
        else:
            kept = inputs.detach()
            output.register_hook(lambda outputs: gradient.products.append(_product(kept, outputs)))
        return output


@contextmanager
def pass_gradients_to(
    use: Callable[[str, torch.nn.Parameter, torch.Tensor], None], parameters: Mapping[str, torch.nn.Parameter]
) -> Iterator[None]:
    """Pass each gradient to `use` as soon as the backward pass has accumulated it, then free it."""

    def hook_of(name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            with torch.no_grad():
                use(name, parameters[name], gradient)

        return hook

    hooks = [p.register_post_accumulate_grad_hook(hook_of(name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _product(inputs: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs.flatten(0, -2), inputs.flatten(0, -2).to(outputs.dtype)


def _lookup(ids: torch.Tensor, outputs: torch.Tensor, padding: int | None) -> tuple[list[int], torch.Tensor]:
    """Sort tokens by id; the padding token has no gradient."""
    ids, order = ids.flatten().sort(stable=True)
    if padding is not None:
        ids, order = ids[ids != padding], order[ids != padding]
    return ids.tolist(), outputs.flatten(0, -2)[order]
