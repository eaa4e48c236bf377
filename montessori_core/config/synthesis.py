"""How data is generated and filtered."""

from typing import Any, Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Probability, Section

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
        0.9, gt=0.0, le=1.0, description="Nucleus sampling: the smallest set of tokens with this total probability."
    )
    presence_penalty: float = Field(
        1.0, ge=-2.0, le=2.0, description="Subtracted from the logits of tokens generated before."
    )
    repetition_penalty: float = Field(
        1.0, gt=0.0, description="Divides the logits of tokens in the prompt or generated before; 1 is off."
    )
    max_tokens: Count = Field(1024, description="Maximum number of generated tokens.")


class Filters(Section):
    """Which instructions are kept. Rejections are counted by reason."""

    min_characters: int = Field(6, ge=1, description="Minimum length of an instruction, characters.")
    max_characters: int = Field(400, ge=1, description="Maximum length of an instruction, characters.")
    max_rouge_l: Probability = Field(
        0.7,
        description="Maximum ROUGE-L F of an instruction with any accepted instruction or demonstration of its prompt.",
    )
    keep_newlines: bool = Field(
        True,
        description="Keep line breaks, which code and lists need; false collapses all whitespace to single spaces, as the "
        "authors' code does.",
    )


class Synthesis(Section):
    """How the teacher is prompted and how its output is filtered."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="Generation engine; 'auto' uses vLLM if it is installed, else transformers."
    )
    engine_options: dict[str, Any] = Field(
        {},
        description="Further options of vLLM's engine, by their names in Python, e.g. {kv_cache_dtype: fp8, max_num_seqs: "
        "64}. Options that another setting determines are refused.",
    )
    request: Literal["own", "paper"] = Field(
        "own",
        description="Wording of the request with prompt_style: chat. 'own' asks for a task of one to three sentences and "
        "nothing else. 'paper' is Figure 13: an explanation, then an instruction of any length with its input.",
    )
    samples_per_prompt: Count = Field(4, description="Instructions generated per prompt.")
    seed_demonstrations: int = Field(6, ge=0, description="Demonstrations per prompt from the seed pool.")
    synthetic_demonstrations: int = Field(
        2, ge=0, description="Demonstrations per prompt from the last iteration; in the first, from the seed pool."
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
    filters: Filters = Field(Filters(), description="Which instructions are kept.")
    oversampling: float = Field(
        1.3,
        ge=1.0,
        description="Candidates per wanted example in the first round. Later rounds replace rejected candidates according to "
        "the last round's acceptance, plus a fifth: acceptance falls as the accepted set grows.",
    )
    max_rounds: Count = Field(6, description="Maximum number of rounds; if examples are still missing, the run fails.")
    prompts_per_shard: Count = Field(256, description="Maximum number of prompts per shard of instruction generation.")
    instructions_per_shard: Count = Field(
        512, description="Maximum number of instructions per shard of response generation."
    )

    @model_validator(mode="after")
    def _options_do_not_replace_settings(self) -> "Synthesis":
        for name, remedy in _SETTINGS_OF_OPTIONS.items():
            if name in self.engine_options:
                raise ValueError(f"engine_options.{name}: {remedy}")
        if self.engine_options and self.engine == "transformers":
            raise ValueError("engine_options are vLLM's, but engine is transformers; set engine: vllm, or remove them")
        return self

    @model_validator(mode="after")
    def _some_demonstrations(self) -> "Synthesis":
        if self.seed_demonstrations + self.synthetic_demonstrations == 0:
            raise ValueError(
                "seed_demonstrations and synthetic_demonstrations are both 0: a prompt needs at least one demonstration"
            )
        return self
