"""Local data influence: how one training step on an example changes the student's loss on the reference set.

influence(z) = L(ref; m) - L(ref; A(z; m)), Eq. 1 of the paper: positive means that the example helps. `A` is one AdamW
step from the warm student m, with its warm moments. The *null step* leads to m0: the same step with a zero gradient.

Names are imported on first use: the driver imports `table`, `screening` and `preferences` without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from montessori_core.influence.adamw import AdamW
    from montessori_core.influence.meter import InfluenceMeter, Measurement
    from montessori_core.influence.reference import Loss, ReferenceSet
    from montessori_core.influence.sequential import SequentialReference
    from montessori_core.influence.student import ResidentStudent

__all__ = ["AdamW", "InfluenceMeter", "Loss", "Measurement", "ReferenceSet", "ResidentStudent", "SequentialReference"]

_MODULES = {
    "AdamW": "adamw",
    "InfluenceMeter": "meter",
    "Loss": "reference",
    "Measurement": "meter",
    "ReferenceSet": "reference",
    "ResidentStudent": "student",
    "SequentialReference": "sequential",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
