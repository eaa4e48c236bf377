"""How data is generated and filtered."""

import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from montessori_core.config.filters import (
    FilterSettings,
    FirstCharacterFilter,
    LengthFilter,
    RougeFilter,
    TextOnlyFilter,
)
from montessori_core.config.section import Count, Section, refuse_names
from montessori_core.config.strategies import (
    PLACEHOLDERS,
    EvolveStrategy,
    SelfInstructStrategy,
    StrategySettings,
)

ENGLISH = "English"
_COMMON = ("language", "open", "close", "topic", "persona")
_MEANINGS = {
    "demonstrations": "demonstrations belong",
    "task": "task to rewrite belongs",
    "passage": "passage belongs",
}

_SETTINGS_OF_OPTIONS = {
    "model": "set teacher.model",
    "tokenizer": "the teacher's is used",
    "trust_remote_code": "code from a model's repository is never run",
    "seed": "each continuation has a seed of its own",
    "tensor_parallel_size": "set cluster.vllm.tensor_parallel",
    "data_parallel_size": "set cluster.vllm.data_parallel",
    "gpu_memory_utilization": "set cluster.vllm.memory_share",
    "max_model_len": "set cluster.vllm.max_model_len",
    "enable_lora": "it is on for a teacher that is an adapter",
    "max_lora_rank": "it follows the teacher's adapter",
    "load_format": "only safetensors are loaded",
    **dict.fromkeys(
        ("worker_cls", "worker_extension_cls", "scheduler_cls", "logits_processors"), "no code is imported"
    ),
    **dict.fromkeys(("io_processor_plugin", "reasoning_parser_plugin"), "no code is imported"),
}


class Sampling(Section):
    """Decoding parameters of one kind of generation (paper, Table 5)."""

    temperature: float = Field(1.0, ge=0.0, description="Softmax temperature; 0 always takes the most probable token.")
    top_p: float = Field(
        0.9,
        gt=0.0,
        le=1.0,
        description="Nucleus sampling: draw from the fewest tokens with this total probability; 1 is off.",
    )
    presence_penalty: float = Field(
        1.0, ge=-2.0, le=2.0, description="Subtracted from the logits of tokens that were generated before; 0 is off."
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0.0,
        description="Factor that lowers the logits of tokens in the prompt or generated before; 1 is off. An API has no "
        "such parameter.",
    )
    max_tokens: Count = Field(1024, description="Maximum number of generated tokens.")


class Synthesis(Section):
    """How the teacher is prompted and how its output is filtered."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="Generation engine; 'auto' uses vLLM if it is installed, else transformers."
    )
    language: str = Field(
        ENGLISH,
        pattern=r"^[^\W\d_][^\n<>{}]{0,39}$",
        description="Language of the instructions, as an English prompt names it: French, Brazilian Portuguese. Our own "
        "prompts ask for it, and the filter first_character depends on it; give seeds of this language, too.",
    )
    engine_options: dict[str, Any] = Field(
        {},
        description="Further options of vLLM's engine, by their names in Python, e.g. {kv_cache_dtype: fp8, max_num_seqs: "
        "64}. Options that another setting determines are refused.",
    )
    strategy: StrategySettings = Field(
        SelfInstructStrategy(),
        description="How the teacher's prompts are made: the name of a strategy (montessori strategies lists them) or "
        "module:NAME of your own, alone or with settings: {name: grounded, documents: notes/}.",
    )
    request: str = Field(
        "own",
        description="Text of the prompt with prompt_style: chat. 'own' asks for a task of one to three sentences and "
        "nothing else. 'paper' is Figure 13: an explanation, then an instruction of any length with its input. Or a text of "
        "yours with {demonstrations} (strategy evolve: {task} and optionally {change}; grounded: {passage}), and optionally "
        "{language}, {open} and {close} (the tags of an instruction), {topic} and {persona} (columns of the seed pool).",
    )
    completion_prompt: str = Field(
        "own",
        description="Text of the prompt with prompt_style: completion: 'own', or a text of yours with the same placeholders. "
        "After it come the separator and an opening tag, which the teacher continues.",
    )
    separator: str = Field(
        "\n",
        description="Text between two demonstrations and, with prompt_style: completion, between the prompt's text and the "
        "new instruction.",
    )
    keep_newlines: bool = Field(
        True,
        description="Keep line breaks in instructions, which code and lists need; false collapses all whitespace to single "
        "spaces, as the authors' code does.",
    )
    samples_per_prompt: Count = Field(
        4,
        description="Instructions generated per prompt; responses per instruction in the methods response and self_reward.",
    )
    seed_demonstrations: int = Field(6, ge=0, description="Demonstrations per prompt from the seed pool.")
    synthetic_demonstrations: int = Field(
        2,
        ge=0,
        description="Demonstrations per prompt from the last iteration's training set; in the first, from the seeds.",
    )
    instruction: Sampling = Field(
        Sampling(temperature=1.0),
        description="Decoding of instructions. Table 5 gives a repetition penalty of 1.5, which the authors' code does not "
        "set: it would penalise the closing tag of an instruction, since each demonstration in the prompt ends with it.",
    )
    response: Sampling = Field(Sampling(temperature=0.6), description="Decoding of responses.")
    answers: Literal["updated", "unmodified", "endpoint"] = Field(
        "updated",
        description="Who answers the instructions of a teacher. 'updated': the teacher that wrote them, as in the paper. "
        "'unmodified': the initial teacher in all iterations, so that an update changes only the instructions. 'endpoint': "
        "the model of the section answerer, in all iterations and also where the initial teacher writes.",
    )
    filters: tuple[FilterSettings, ...] = Field(
        (LengthFilter(), TextOnlyFilter(), FirstCharacterFilter(), RougeFilter()),
        description="Which instructions are kept: a list of filters, applied in order; the first that rejects an instruction "
        "is counted. An entry is the name of a filter (montessori filters lists them) or module:NAME of your own, alone or "
        "with settings: {name: rouge_l, maximum: 0.6}.",
    )
    oversampling: float = Field(
        1.3,
        ge=1.0,
        description="Candidates per wanted example in the first round. Later rounds generate as many as the acceptance rate "
        "of the last round requires, and a fifth more, since the rate falls as the accepted set grows.",
    )
    max_rounds: Count = Field(6, description="Maximum number of rounds; if examples are still missing, the run fails.")
    prompts_per_shard: Count = Field(256, description="Maximum number of prompts per shard of instruction generation.")
    instructions_per_shard: Count = Field(
        512, description="Maximum number of instructions per shard of response generation."
    )

    @field_validator("request", "completion_prompt")
    @classmethod
    def _template_fits_strategy(cls, text: str, info: ValidationInfo) -> str:
        """Check the placeholders of a prompt's text, unless it is the name of a text."""
        strategy = info.data["strategy"].name if "strategy" in info.data else "self_instruct"
        if text == "own" or (text == "paper" and strategy == "self_instruct"):
            return text
        required = PLACEHOLDERS.get(strategy)
        if required is None:
            raise ValueError(f"the strategy {strategy} takes no text from here; set 'own'")
        placeholders = (required, *(["change"] if strategy == "evolve" else []), *_COMMON)
        unknown = [name for name in re.findall(r"\{([^\W\d]\w*)\}", text) if name not in placeholders]
        if unknown:
            names = ", ".join(f"{{{name}}}" for name in placeholders)
            raise ValueError(f"there is no placeholder {{{unknown[0]}}}; known: {names}")
        if f"{{{required}}}" not in text:
            named = "'own', 'paper'" if strategy == "self_instruct" else "'own'"
            raise ValueError(
                f"give the name of a text ({named}), or a text with {{{required}}} where the {_MEANINGS[required]}"
            )
        return text

    @field_validator("filters", mode="before")
    @classmethod
    def _filters_are_listed(cls, value: Any) -> Any:
        if isinstance(value, dict | str):
            raise ValueError(
                "filters is a list, such as [length, text_only, first_character, {name: rouge_l, maximum: 0.7}]"
            )
        return value

    @model_validator(mode="after")
    def _prompts_are_in_the_language(self) -> "Synthesis":
        if self.completion_prompt == "paper":
            raise ValueError("completion_prompt: the paper has no such prompt; set 'own', or a text of yours")
        if self.request == "paper" and not self.in_english:
            raise ValueError(
                f"request: paper (Figure 13) is for English, but language is {self.language}; set request: own, or a text "
                "of yours with {demonstrations}"
            )
        return self

    @model_validator(mode="after")
    def _options_do_not_replace_settings(self) -> "Synthesis":
        refuse_names(self.engine_options, _SETTINGS_OF_OPTIONS, "engine_options")
        if self.engine_options and self.engine == "transformers":
            raise ValueError("engine_options are vLLM's, but engine is transformers; set engine: vllm, or remove them")
        return self

    @model_validator(mode="after")
    def _some_demonstrations(self) -> "Synthesis":
        if isinstance(self.strategy, SelfInstructStrategy) and self.seeds_needed == 0:
            raise ValueError(
                "seed_demonstrations and synthetic_demonstrations are both 0: a prompt needs at least one demonstration"
            )
        return self

    @property
    def seeds_needed(self) -> int:
        """Number of seeds that a prompt of the first iteration needs."""
        if isinstance(self.strategy, SelfInstructStrategy):
            return self.seed_demonstrations + self.synthetic_demonstrations
        return 1 if isinstance(self.strategy, EvolveStrategy) else 0

    @property
    def in_english(self) -> bool:
        """Whether the instructions are in English."""
        return self.language.casefold() == ENGLISH.casefold()
