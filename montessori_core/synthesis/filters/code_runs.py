"""The filter `code_runs`: the Python code blocks of a response run without an error, in a sandbox on a node."""

from montessori_core.config import CodeRunsFilter
from montessori_core.synthesis.filters.filter import Candidate, Context, Filter, Reject
from montessori_core.synthesis.sandbox import FAILS, LIMITS, NO_CODE

_REASONS = {FAILS: "its code fails", LIMITS: "its code exceeds its limits"}


def _open(settings: CodeRunsFilter, context: Context) -> Reject:
    reasons = _REASONS | ({NO_CODE: "no Python code"} if settings.need_code else {})

    def reject(candidate: Candidate) -> str | None:
        return reasons.get(context.measured[candidate.instruction, candidate.response])

    return reject


CODE_RUNS = Filter(
    "code_runs",
    "Examples whose Python code runs; jobs run a model's code, see docs/security.md.",
    _open,
    CodeRunsFilter,
    reads="examples",
    has_jobs=True,
)
