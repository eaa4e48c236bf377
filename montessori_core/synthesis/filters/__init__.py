"""Filters of instructions and examples, named in `synthesis.filters`; `REGISTRY` has them by name.

See `filter` to write your own.
"""

from montessori_core.synthesis.filters.code_runs import CODE_RUNS
from montessori_core.synthesis.filters.filter import Filter
from montessori_core.synthesis.filters.first_character import FIRST_CHARACTER
from montessori_core.synthesis.filters.judge import JUDGE
from montessori_core.synthesis.filters.language import LANGUAGE
from montessori_core.synthesis.filters.length import LENGTH
from montessori_core.synthesis.filters.rouge_l import ROUGE_L
from montessori_core.synthesis.filters.script import SCRIPT
from montessori_core.synthesis.filters.semantic import SEMANTIC
from montessori_core.synthesis.filters.text_only import TEXT_ONLY
from montessori_core.synthesis.filters.words import WORDS

REGISTRY: dict[str, Filter] = {
    filter.name: filter
    for filter in (LENGTH, TEXT_ONLY, WORDS, FIRST_CHARACTER, SCRIPT, LANGUAGE, ROUGE_L, SEMANTIC, JUDGE, CODE_RUNS)
}
