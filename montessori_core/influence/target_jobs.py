"""The program that measures influence on several reference sets in one pass over the examples.

To first order, a step is projected onto the gradients of all sets: a further set costs its gradient, and two inner products
of each step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from montessori_core import programs
from montessori_core.data.rows import ExampleRow
from montessori_core.influence.jobs import describe_example, encoded_batches, load_student, notes_of, resident_student
from montessori_core.influence.meter import FirstOrder, Measurement, measure_together
from montessori_core.influence.reference import ReferenceSet, open_reference
from montessori_core.influence.reference_state import ReferenceState, shared_state
from montessori_core.influence.student import ResidentStudent
from montessori_core.influence.table import schema_by_target
from montessori_core.models.chat import Encoded
from montessori_core.program import Recorder, RowProgram


class TargetsMeter:
    """Measure influence on several reference sets to first order.

    Attributes:
        targets: one per reference set, in their order.
    """

    def __init__(
        self,
        student: ResidentStudent,
        references: Sequence[ReferenceSet],
        reduction: str = "example",
        shared: Path | None = None,
    ) -> None:
        """Evaluate the student and its null step on each reference set, unless another worker has.

        Args:
            student: the student; it takes no further step.
            references: the reference sets.
            reduction: reduction of the reference loss, 'example' or 'token'.
            shared: see `InfluenceMeter`; a set has a folder there.

        Raises:
            DataError: the student's loss on a reference set is not finite.
        """
        self._student = student
        states: list[ReferenceState] = []
        for number, reference in enumerate(references):

            def measure(reference: ReferenceSet = reference) -> ReferenceState:
                return ReferenceState.measure(student, reference, "first_order", reduction)

            states.append(shared_state(shared / str(number), student.place, measure) if shared else measure())
        student.end_steps()
        self.targets = [
            FirstOrder.of(student, state, reduction, len(reference))
            for state, reference in zip(states, references, strict=True)
        ]

    def measure_batch(self, examples: Sequence[Encoded]) -> list[list[Measurement]]:
        """Measure examples; return the measurements of each, one per reference set: the bits of `InfluenceMeter`."""
        return measure_together(self._student, self.targets, examples)


def open_targets(settings: programs.InfluenceMeasurement, inputs: Mapping[str, Path]) -> RowProgram[ExampleRow]:
    """Load the student, its moments and the reference sets once.

    Inputs: `student`; `moments`, without which the step is a first one; `reference_1`, `reference_2` and so on (tasks);
    `shared`, see `open_program`, without which nothing is shared.
    """
    tokenizer, model = load_student(settings, inputs)
    names = [f"reference_{number}" for number in range(1, len(inputs) + 1) if f"reference_{number}" in inputs]
    tokens = settings.reference_batch_tokens
    references = [open_reference(tokenizer, inputs[name], settings.max_length, tokens, model.device) for name in names]
    student = resident_student(model, settings, inputs, "first_order", tokens, targets=len(names))
    meter = TargetsMeter(student, references, settings.reference_reduction, inputs.get("shared"))
    notes = [notes_of(target, reference, settings) for target, reference in zip(meter.targets, references, strict=True)]

    def compute(rows: list[ExampleRow], recorder: Recorder) -> None:
        for positions, examples in encoded_batches(tokenizer, rows, settings.max_length, recorder):
            measured = meter.measure_batch(examples)
            for position, example, of_targets in zip(positions, examples, measured, strict=True):
                about = describe_example(rows[position], example) | {"estimator": settings.estimator, "audited": False}
                records = [{"target": number} | about | vars(found) for number, found in enumerate(of_targets)]
                recorder.finish(position, records)

    return RowProgram(schema_by_target(notes), compute)
