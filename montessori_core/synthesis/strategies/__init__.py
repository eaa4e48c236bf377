"""Strategies of prompts, named in `synthesis.strategy`; `REGISTRY` has them by name. See `strategy` to write your own."""

from montessori_core.synthesis.strategies.evolve import EVOLVE
from montessori_core.synthesis.strategies.grounded import GROUNDED
from montessori_core.synthesis.strategies.magpie import MAGPIE
from montessori_core.synthesis.strategies.self_instruct import SELF_INSTRUCT
from montessori_core.synthesis.strategies.strategy import Strategy

REGISTRY: dict[str, Strategy] = {strategy.name: strategy for strategy in (SELF_INSTRUCT, EVOLVE, GROUNDED, MAGPIE)}
