"""Methods that propose training data, one module each; `REGISTRY` has them by name. See `method` to write your own."""

from flows.methods.bootstrap import BOOTSTRAP
from flows.methods.length_matched import LENGTH_MATCHED
from flows.methods.llm2llm import LLM2LLM
from flows.methods.method import Method
from flows.methods.montessori import MONTESSORI
from flows.methods.nomad import NOMAD
from flows.methods.random_draw import RANDOM
from flows.methods.response import RESPONSE
from flows.methods.select import SELECT
from flows.methods.self_instruct import SELF_INSTRUCT, SELF_INSTRUCT_STRONG
from flows.methods.self_reward import SELF_REWARD
from flows.methods.signals import ARTE, LLM_JUDGE, TRAINING_LOSS
from flows.methods.target_seeds import TARGET_SEEDS

REGISTRY: dict[str, Method] = {
    method.name: method
    for method in (
        MONTESSORI,
        SELF_INSTRUCT,
        SELF_INSTRUCT_STRONG,
        TARGET_SEEDS,
        SELECT,
        RANDOM,
        LENGTH_MATCHED,
        SELF_REWARD,
        LLM_JUDGE,
        TRAINING_LOSS,
        ARTE,
        RESPONSE,
        BOOTSTRAP,
        LLM2LLM,
        NOMAD,
    )
}
