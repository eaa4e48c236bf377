"""Local data influence: how one training step on an example changes the student's loss on the reference set.

influence(z) = L(ref; m) - L(ref; A(z; m)), Eq. 1 of the paper: positive means that the example helps. `A` is one AdamW
step from the warm student m, with its warm moments. The *null step* m0 is what those moments alone would do.
"""

from montessori_core.influence.adamw import AdamW
from montessori_core.influence.estimators import InfluenceMeter, Measurement
from montessori_core.influence.reference import Loss, ReferenceSet
from montessori_core.influence.sequential import SequentialReference
from montessori_core.influence.student import ResidentStudent

__all__ = [
    "AdamW",
    "InfluenceMeter",
    "Loss",
    "Measurement",
    "ReferenceSet",
    "ResidentStudent",
    "SequentialReference",
]
