"""Derivatives of example losses along fixed directions of the weights, for batches of examples.

The derivative of a loss along a direction U of a linear layer's weight is the sum of dY ⊙ X U^T over tokens and outputs,
where X are the layer's inputs and dY its output gradients. One backward pass serves all examples of a batch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from montessori_core.influence.losses import Batch

_BLOCK = 1 << 17
"""Elements of a block of a weight gradient on a CPU, where it stays in the cache."""
_PRODUCTS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
_SUMS = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
_NORMS = {functional.layer_norm: ("weight", "bias", "eps"), functional.rms_norm: ("weight", "eps")}
"""Norms and the names of their arguments after input and shape."""

Directions = Mapping[str, Sequence[torch.Tensor]]
"""By parameter name: tensors [rows, columns]. Parameters are seen as matrices; columns is the last dimension."""


class InseparableError(Exception):
    """The model uses a parameter in a way that does not tell the examples of a batch from each other."""


class ExampleDerivatives(TorchFunctionMode):
    """Derivatives of each example's loss along directions, while the mode is active and in the backward pass after it.

    Linear layers, embedding layers, norms, and products with a vector or with a number more than it, get detached
    parameters; a hook on their output adds the examples' derivatives. Autograd computes the gradients of all other uses, see
    `add_gradient`.

    Attributes:
        totals: [batch, directions] in fp64.
        tokens: of each example, its token ids, each once.
        rows: of each table and example, the gradient of the rows of these tokens, [tokens, columns] in fp32.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        along: Directions,
        batch: Batch,
        directions: int,
        tables: Collection[str] = (),
    ) -> None:
        """Prepare for a forward pass.

        Args:
            parameters: trained parameters.
            along: their directions.
            batch: of the forward pass.
            directions: their number.
            tables: names of parameters with a row for each token.
        """
        super().__init__()
        # Padding is no token of an example; its gradients, which are zeros, may be added anywhere.
        self.tokens = [ids[:length].unique() for ids, length in zip(batch.input_ids, batch.lengths, strict=True)]
        self.rows = {
            name: [torch.zeros(len(ids), parameters[name].shape[1], device=ids.device) for ids in self.tokens]
            for name in tables
        }
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        # Vectors plus a number: kept, so that no other tensor gets the id of one.
        self._shifted: list[torch.Tensor] = []
        self._directions, self._batch = along, batch
        self._size, self._width = batch.input_ids.shape
        self._projected: torch.Tensor | None = None  # [labelled] examples of the positions that are now projected
        self.totals = torch.zeros(self._size, directions, dtype=torch.float64, device=batch.input_ids.device)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if not torch.is_grad_enabled():
            return function(*args, **options)
        if function in _NORMS:
            return self._norm(function, *args, **options)
        if function in _SUMS or function is torch.Tensor.float:
            return self._shift(function(*args, **options), args)
        if len(args) < 2:
            return function(*args, **options)
        if function in (functional.linear, functional.embedding) and id(args[1]) in self._names:
            return self._layer(function, *args, **options)
        if function in _PRODUCTS:
            for place in (0, 1):
                name = self._names.get(id(args[place]))
                if name is not None and args[place].dim() == 1:
                    return self._product(name, args[1 - place], args[place])
        return function(*args, **options)

    @contextmanager
    def projecting(self, part: slice) -> Iterator[None]:
        """Note that the layers called in this context get these labelled positions instead of all tokens."""
        self._projected = self._batch.rows[part]
        try:
            yield
        finally:
            self._projected = None

    def add_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Add the derivatives that follow from a parameter's gradient, if the batch has one example.

        Raises:
            InseparableError: it is the sum over several examples.
        """
        if self._size > 1:
            raise InseparableError(name)
        if name in self.rows:
            self.rows[name][0] += gradient[self.tokens[0]].float()
        self._add_vectors(name, gradient.reshape(1, -1))

    def _layer(self, function: Any, inputs: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> Any:
        name, kept = self._names[id(weight)], inputs.detach()
        if function is functional.embedding:
            output, rows = function(inputs, weight.detach(), *rest, **options), self._rows(name, inputs.numel())
            use = partial(self._add_lookups, name, rows, kept, options.get("padding_idx"))
        else:
            bias = rest[0] if rest else options.get("bias")
            output = function(inputs, weight.detach(), None if bias is None else bias.detach())
            rows = self._rows(name, inputs[..., 0].numel())
            use = partial(self._add_linear, name, self._names.get(id(bias)), rows, kept)
        return _with_hook(output, use)

    def _norm(self, function: Any, inputs: torch.Tensor, shape: Any, *rest: Any, **options: Any) -> torch.Tensor:
        settings = dict(zip(_NORMS[function], rest, strict=False)) | options
        vectors = {kind: vector for kind, vector in settings.items() if id(vector) in self._names}
        if not vectors:
            return function(inputs, shape, **settings)  # type: ignore[no-any-return]
        kept, plain = inputs.detach(), settings | dict.fromkeys(_NORMS[function][:-1])

        def use(gradient: torch.Tensor) -> None:
            for kind, vector in vectors.items():
                values = torch.ones_like(kept) if kind == "bias" else function(kept, shape, **plain)
                self._add_product(self._names[id(vector)], values, gradient)

        detached = {kind: vector.detach() for kind, vector in vectors.items()}
        return _with_hook(function(inputs, shape, **settings | detached), use)

    def _shift(self, result: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        """Note that a vector plus a number, or in another dtype, has the gradient of the vector."""
        vectors = [value for value in args if isinstance(value, torch.Tensor)]
        name = self._names.get(id(vectors[0])) if len(vectors) == 1 and vectors[0].dim() == 1 else None
        if name is not None and id(result) not in self._names:
            self._names[id(result)] = name
            self._shifted.append(result)
        return result

    def _product(self, name: str, values: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return _with_hook(values * vector.detach(), partial(self._add_product, name, values.detach()))

    def _add_product(self, name: str, values: torch.Tensor, gradient: torch.Tensor) -> None:
        if self._size > 1 and len(values) != self._size:
            raise InseparableError(name)
        by_example = (values * gradient).reshape(self._size, -1, values.shape[-1]).sum(1, dtype=torch.float32)
        self._add_vectors(name, by_example)

    def _add_vectors(self, name: str, by_example: torch.Tensor) -> None:
        by_example = by_example.float()
        along = [by_example @ direction.flatten().float() for direction in self._directions[name]]
        self.totals += torch.stack(along, 1).double()

    def _add_lookups(
        self, name: str, rows: torch.Tensor, ids: torch.Tensor, padding: int | None, gradient: torch.Tensor
    ) -> None:
        ids, gradient = ids.flatten(), gradient.flatten(0, -2)
        if padding is not None:
            rows, ids, gradient = rows[ids != padding], ids[ids != padding], gradient[ids != padding]
        for number, kept in enumerate(self.rows.get(name, ())):
            own = rows == number
            kept.index_add_(0, torch.searchsorted(self.tokens[number], ids[own]), gradient[own].float())
        along = [(direction[ids].float() * gradient).sum(-1) for direction in self._directions[name]]
        self.totals.index_add_(0, rows, torch.stack(along, 1).double())

    def _add_linear(
        self, name: str, bias: str | None, rows: torch.Tensor, inputs: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        inputs, gradient = inputs.flatten(0, -2).to(gradient.dtype), gradient.flatten(0, -2)
        if bias is not None:
            sums = torch.zeros(self._size, gradient.shape[1], device=gradient.device)
            self._add_vectors(bias, sums.index_add_(0, rows, gradient.float()))
        for number, kept in enumerate(self.rows.get(name, ())):
            own = rows == number
            kept += gradient[own][:, self.tokens[number]].t().float() @ inputs[own].float()
        if not inputs.is_cuda:
            self._add_by_blocks(name, rows, inputs, gradient)
            return
        for number, direction in enumerate(self._directions[name]):
            along = inputs @ direction.to(inputs.dtype).t()
            products = torch.linalg.vecdot(along.float(), gradient.float())
            self.totals[:, number].index_add_(0, rows, products.double())

    def _add_by_blocks(self, name: str, rows: torch.Tensor, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Form each example's weight gradient block by block: further directions cost almost nothing."""
        directions, parts = self._directions[name], _parts(rows, self._size)
        height = max(1, _BLOCK // inputs.shape[1])
        sums = torch.zeros_like(self.totals)
        for start in range(0, gradient.shape[1], height):
            block = torch.stack([d[start : start + height].flatten().to(gradient.dtype) for d in directions])
            for number, part in enumerate(parts):
                weights = gradient[part, start : start + height].t() @ inputs[part]
                sums[number] += block @ weights.flatten()
        self.totals += sums

    def _rows(self, name: str, tokens: int) -> torch.Tensor:
        """Return [tokens] the example of each token of a layer's input."""
        device = self.totals.device
        if self._size == 1:
            return torch.zeros(tokens, dtype=torch.long, device=device)
        if self._projected is not None and tokens == len(self._projected):
            return self._projected
        if tokens == self._size * self._width:
            return torch.arange(tokens, device=device) // self._width
        raise InseparableError(name)


def _with_hook(output: torch.Tensor, use: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Pass the gradient of a layer's output to `use` in the backward pass."""
    if not output.requires_grad:  # nothing before this layer is trained
        output.requires_grad_()
    output.register_hook(use)
    return output


def _parts(rows: torch.Tensor, size: int) -> list[slice]:
    """Return where the tokens of each example are; `rows` ascends."""
    stops = torch.bincount(rows, minlength=size).cumsum(0).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
