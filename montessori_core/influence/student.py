"""The resident student: loaded once; takes a step on each example and restores its weights.

The backward pass frees each gradient once it is used. Resident are the weights, the moments and, for exact influence, a
snapshot of the weights. Moments, snapshot and reference gradients may be in host memory and are then copied to the device
chunk by chunk (`montessori plan` shows which).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from montessori_core.errors import DataError
from montessori_core.formatting import first_names
from montessori_core.influence.adamw import BLOCK, AdamW, GradientTally
from montessori_core.influence.gradients import FactoredGradient, GradientCapture, pass_gradients_to
from montessori_core.influence.host_memory import pinned_tensors
from montessori_core.influence.losses import Batch, TokenLosses, example_loss
from montessori_core.influence.projections import Direction, Projection, RandomDirections, as_matrix
from montessori_core.influence.rounding import perturb_weights
from montessori_core.influence.token_rows import TokenRows
from montessori_core.models.linear_layers import cast_linear_layers_
from montessori_core.training.moments import Moments, number_type, weights_checksums

Home = Literal["device", "host", "host, then device"]
"""The last is in host memory until the reference set is measured."""
Placement = Mapping[str, Home]
"""Home of each kind of tensor; 'gradient sum' becomes the reference gradient, see `ResidentStudent.round_gradients`."""

ON_DEVICE: Placement = {
    "first moment": "device",
    "second moment": "device",
    "snapshot": "device",
    "gradient sum": "device",
    "reference gradient": "device",
    "half gradient": "device",
}

_SMALL = 1 << 17
"""Elements of a gradient without factors that is kept for a batch of examples; a larger one is used at once."""


@dataclass(frozen=True)
class ExampleGradient:
    """Loss and gradient statistics of an example; norm and share have no meaning if the loss is not finite.

    Attributes:
        loss: loss before the step, nats per token.
        norm: norm of the unweighted gradient.
        dominated_share: share of the coordinates in which the weighted gradient dominates AdamW's denominator.
    """

    loss: float
    norm: float
    dominated_share: float


class ResidentStudent:
    """A model with its moments, from which it takes single steps.

    Attributes:
        losses: token losses of the model with its current weights.
        device: device of the model.
        parameters: trained parameters, by name.
    """

    def __init__(
        self,
        model: Any,
        moments: Moments,
        adamw: AdamW,
        device: torch.device,
        mixed: bool = False,
        placement: Placement = ON_DEVICE,
        typical_tokens: float | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        """Take over `model`, which is on `device` and has the dtype of the steps.

        Args:
            model: the model; weights without `requires_grad` (the base of a LoRA student) are not trained.
            moments: moments of the trained parameters.
            adamw: the step.
            device: device of the model.
            mixed: compute the example's gradient with bf16 activations; weights and reference losses keep their dtype.
            placement: home of moments, snapshot and gradients.
            typical_tokens: response tokens of an example whose weight is that of `adamw`; the weight of others is in
                proportion to their response tokens. None: all have the same weight.
            state_dtype: what moments and reference gradients are kept in; arithmetic is in the dtype of the weights, and
                of projections in fp32. None: that of the weights.

        Raises:
            DataError: the moments belong to another model.
        """
        self.device, self.losses, self._model = device, TokenLosses(model.eval()), model
        self._adamw, self._mixed, self._placement = adamw, mixed, placement
        self._typical_tokens, self._state_dtype = typical_tokens, state_dtype
        self.parameters: dict[str, torch.nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        _check_moments(moments, self.parameters)
        self._unused: dict[str, dict[str, torch.Tensor]] = {}  # pinned memory, by kind and parameter
        self._first, self._second = (
            {
                name: self.place(tensors[name].to(state_dtype or p.dtype), kind, name)
                for name, p in self.parameters.items()
            }
            for tensors, kind in ((moments.first, "first moment"), (moments.second, "second moment"))
        )
        self._snapshot = {n: self.place(p.detach().clone(), "snapshot", n) for n, p in self.parameters.items()}
        self._coordinates = sum(p.numel() for p in self.parameters.values())

    @torch.no_grad()
    def take_null_step(self) -> None:
        """Update the weights by a step with a zero gradient: momentum alone."""
        for name, parameter in self.parameters.items():
            self._step(name, parameter, None)

    def take_step(self, batch: Batch) -> ExampleGradient:
        """Update the weights by one step on an example, unless its loss is not finite."""
        tally = GradientTally()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed):
            loss = example_loss(self.losses, batch)
        value = float(loss.detach())
        if math.isfinite(value):
            unreached = dict(self.parameters)

            def step(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
                del unreached[name]
                self._step(name, parameter, gradient, tally)

            with pass_gradients_to(step, self.parameters):
                (loss * self._relative_weight(batch)).backward()
            with torch.no_grad():  # an expert that gets no token, see `_factored_backward`
                for name, parameter in unreached.items():
                    self._step(name, parameter, torch.zeros_like(parameter), tally)
        norm = tally.norm / self._relative_weight(batch)
        return ExampleGradient(value, norm, tally.dominated / self._coordinates)

    def perturb(self) -> None:
        """Perturb the weights by their rounding error, see `perturb_weights`."""
        perturb_weights(self.parameters)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights from the snapshot, bit for bit."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._snapshot[name], non_blocking=True)

    def project_steps(
        self, batches: Sequence[Batch], projection: Projection
    ) -> list[tuple[ExampleGradient, torch.Tensor]]:
        """Return gradient statistics of each example, and the projection of its step in fp64, without taking the step.

        Each example has its own forward and backward pass; moments and directions are read once for all examples. The result
        of an example does not depend on the others. Numbers that are not finite are NaN, as are all of an example without
        a finite loss.

        Args:
            batches: of one example each. The factors of all gradients are in memory at once, see `FactoredGradient`.
            projection: what the steps are projected onto.
        """
        totals = torch.zeros(len(batches), projection.size + 2, dtype=torch.float64, device=self.device)
        losses, pending = [], []
        for batch, total in zip(batches, totals, strict=True):

            def project(name: str, gradient: torch.Tensor, total: torch.Tensor = total) -> None:
                gradients = [FactoredGradient(dense=[as_matrix(gradient)])]
                self._add_projections(total[None], name, projection, gradients)

            loss, gradients = self._factored_backward(batch, project)
            losses.append(loss)
            pending.append(gradients)
        with torch.no_grad():
            for name in self.parameters:
                rows = [row for row, gradients in enumerate(pending) if name in gradients]
                if rows:
                    self._add_projections(totals, name, projection, [pending[row].pop(name) for row in rows], rows)
        results = []
        for batch, loss, total in zip(batches, losses, totals.cpu(), strict=True):
            square, dominated = total[-2:].tolist()
            norm = math.sqrt(square) / self._relative_weight(batch)
            finite = math.isfinite(loss) and bool(total[:-2].isfinite().all())
            numbers = total[:-2] if finite else torch.full_like(total[:-2], math.nan)
            results.append((ExampleGradient(loss, norm, dominated / self._coordinates), numbers))
        return results

    @torch.no_grad()
    def project_null_step(self, projection: Projection) -> torch.Tensor:
        """Return the projection of the null step, in fp64."""
        total = torch.zeros(1, projection.size + 2, dtype=torch.float64, device=self.device)
        for name in self.parameters:
            self._add_projections(total, name, projection, [FactoredGradient()])
        return total[0, :-2].cpu()

    def random_directions(self, size: int) -> RandomDirections:
        """Return random directions for the steps of this student, see `RandomDirections`."""
        return RandomDirections(self._second, size, self.device)

    @torch.no_grad()
    def project_gradient(self, directions: RandomDirections, gradient: Direction) -> torch.Tensor:
        """Return the projection of a reference gradient, in fp64."""
        total = torch.zeros(directions.size, dtype=torch.float64, device=self.device)
        for name in self.parameters:
            for rows, second, part in self._blocks(as_matrix(self._second[name]), as_matrix(gradient[name])):
                total[directions.place(name)] += directions.gradient(name, rows, part, second)
        return total.cpu()

    def zeros(self) -> dict[str, torch.Tensor]:
        """Return zeros in the shape and dtype of the trained parameters, to add gradients to."""
        kind = "gradient sum" if self._state_dtype else "reference gradient"
        return {name: self.place(torch.zeros_like(p), kind, name) for name, p in self.parameters.items()}

    def round_gradients(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return added-up reference gradients rounded to `state_dtype`, in their home; take them out of `sums`."""
        dtype = self._state_dtype
        if dtype is None:
            return sums
        return {name: self.place(sums.pop(name).to(dtype), "reference gradient", name) for name in list(sums)}

    def add_gradients(
        self, accumulate: Callable[[], None], onto: dict[str, torch.Tensor], square_weight: float = 0.0
    ) -> None:
        """Add up the gradients of all backward passes that `accumulate` runs.

        Args:
            accumulate: runs the backward passes.
            onto: gradients to add to, by parameter name.
            square_weight: factor of each pass's squared gradient, for `linearise_`.
        """

        def add(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
            onto[name] += gradient.to(onto[name].device)
            if square_weight:
                second = self._second[name]
                gradient = gradient.to(second.device)
                ours = second.device.type != "cpu" or second.is_pinned()  # other memory may be the caller's
                share = square_weight * self._adamw.own_share
                self._second[name] = torch.addcmul(
                    second, gradient, gradient, value=share, out=second if ours else None
                )

        with pass_gradients_to(add, self.parameters):
            accumulate()

    @torch.no_grad()
    def copy_in_bf16(self, gradients: Direction) -> dict[str, torch.Tensor]:
        """Return a copy of gradients in bf16, which is precise enough for a standard error."""
        return {
            name: self.place(gradient.to(torch.bfloat16, copy=True), "half gradient", name)
            for name, gradient in gradients.items()
        }

    def moments_of_tokens(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return both moments of the embeddings and of the vocabulary projection, if these are trained.

        The second ones are copies, in host memory: `add_gradients` may add to those of the student.
        """
        tables = {id(table) for table in self.losses.token_tables}
        names = [name for name, parameter in self.parameters.items() if id(parameter) in tables]
        return {name: (self._first[name], self._second[name].to("cpu", copy=True)) for name in names}

    def token_rows(
        self, moments: Mapping[str, tuple[torch.Tensor, torch.Tensor]], full: Direction, half: Direction
    ) -> dict[str, TokenRows]:
        """Return the step on rows of tokens.

        Args:
            moments: see `moments_of_tokens`.
            full, half: gradients of the reference loss and of half of it, by parameter name.
        """
        return {
            name: TokenRows.of(self._adamw, first, second, full[name], half[name])
            for name, (first, second) in moments.items()
        }

    @torch.no_grad()
    def linearise_(self, gradients: Direction) -> None:
        """Replace reference gradients by their directions for a linear step, see `AdamW.linear_direction`.

        Call `add_gradients` before: it adds a typical example's part, its mean squared gradient, to the second moment, so
        that the student can take no further step.
        """
        for name, gradient in gradients.items():
            on_device = (tensor.to(self.device, torch.float32) for tensor in (gradient, self._second[name]))
            gradient.copy_(self._adamw.linear_direction(*on_device))

    def place(self, tensor: torch.Tensor, kind: str, name: str) -> torch.Tensor:
        """Return the tensor of the parameter `name` in the home of its kind, see `Placement`."""
        tensor = tensor.contiguous()
        if self._placement[kind] == "device":
            return tensor.to(self.device)
        stays = self._placement[kind] == "host" and kind != "gradient sum"
        if self.device.type == "cpu" or not stays:  # pinned memory is not freed
            return tensor.cpu()
        if not self._unused.get(kind):
            dtype = {"snapshot": None, "half gradient": torch.bfloat16}.get(kind, self._state_dtype)
            self._unused[kind] = pinned_tensors({n: (p.shape, dtype or p.dtype) for n, p in self.parameters.items()})
        return self._unused[kind].pop(name).copy_(tensor)

    def end_steps(self) -> None:
        """Free what only steps need: the snapshot and, in mixed precision, linear layers in fp32. Then move the moments."""
        self._snapshot.clear()
        if self._mixed:
            cast_linear_layers_(self._model)
        self.settle(self._first, "first moment")
        self.settle(self._second, "second moment")

    def settle(self, tensors: dict[str, torch.Tensor], kind: str) -> None:
        """Move tensors of a kind to where they stay while examples are measured; call it after `end_steps`."""
        if self._placement[kind] == "host, then device":
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(self.device)

    def _relative_weight(self, batch: Batch) -> float:
        """Return the weight of a batch of one example, relative to that of the step."""
        return 1.0 if self._typical_tokens is None else len(batch.targets) / self._typical_tokens

    def _factored_backward(
        self, batch: Batch, project: Callable[[str, torch.Tensor], None]
    ) -> tuple[float, dict[str, FactoredGradient]]:
        """Return the loss, and the gradient of each parameter that was not passed to `project`; none if it is not finite.

        Large gradients without factors are passed to `project`, then freed. A parameter without a gradient has a zero
        gradient: an expert that gets no token. In a training batch other examples reach it, and the null step updates it as
        well; so its momentum counts.
        """
        capture, used = GradientCapture(self.parameters), set()

        def use(name: str, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
            if name in capture.gradients or gradient.numel() <= _SMALL:
                capture.gradients.setdefault(name, FactoredGradient()).dense.append(as_matrix(gradient))
            else:
                used.add(name)
                project(name, gradient)

        with capture, torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed):
            loss = example_loss(self.losses, batch, capture)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value, {}
        with pass_gradients_to(use, self.parameters):
            (loss * self._relative_weight(batch)).backward()
        return value, {n: capture.gradients.get(n, FactoredGradient()) for n in self.parameters if n not in used}

    def _step(
        self,
        name: str,
        parameter: torch.nn.Parameter,
        gradient: torch.Tensor | None,
        tally: GradientTally | None = None,
    ) -> None:
        self._adamw.step_(parameter, gradient, self._first[name], self._second[name], tally)

    def _add_projections(
        self,
        totals: torch.Tensor,
        name: str,
        projection: Projection,
        gradients: Sequence[FactoredGradient],
        examples: Sequence[int] | slice = slice(None),
    ) -> None:
        """Add what one parameter contributes to `totals[examples]`, [examples, size + 2], see `AdamW.project`."""
        place, added = projection.place(name), torch.zeros((), device=self.device)
        for rows, first, second in self._blocks(as_matrix(self._first[name]), as_matrix(self._second[name])):
            blocks = (gradient.rows(rows.start, rows.stop, first).reshape(-1) for gradient in gradients)
            projected = projection.onto(name, rows, second)
            added = added + self._adamw.project(blocks, first.view(-1), second.view(-1), projected)
        totals[examples, place] += added[:, :-2]
        totals[examples, -2:] += added[:, -2:]

    def _blocks(self, *tensors: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield slices of rows, and these rows of all matrices, on the device and at least in fp32."""
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        rows, columns = tensors[0].shape
        height = max(1, BLOCK[self.device.type] // columns)
        for start in range(0, rows, height):
            part = slice(start, min(start + height, rows))
            yield part, *(tensor[part].to(self.device, dtype, non_blocking=True) for tensor in tensors)


def _check_moments(moments: Moments, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Check that the moments are those of a student with these parameters.

    Raises:
        DataError: they are not.
    """
    source = f"{moments.path}: the AdamW moments" if moments.path else "the AdamW moments"
    remedy = "give the folder of moments that were saved with this student"
    unmatched = sorted(set(parameters) ^ set(moments.first))
    reshaped = [n for n, p in parameters.items() if n in moments.first and moments.first[n].shape != p.shape]
    if unmatched or reshaped:
        raise DataError(
            f"{source} belong to another model: {len(unmatched)} parameters are in one of the two only, {len(reshaped)} "
            f"differ in shape ({first_names([*unmatched, *reshaped])}); {remedy}"
        )
    if moments.weights is None:
        return
    dtype = number_type(next(iter(parameters.values())).dtype)
    if moments.weights[dtype] != weights_checksums(parameters.items())[dtype]:
        raise DataError(f"{source} fit this architecture but were saved with other weights; {remedy}")
