"""Teacher, student, and models behind an API."""

from typing import Any, Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Section, VariableName, refuse_names

Variables = dict[str, str | int | float | bool]
_TEMPLATE: Any = Field(
    None,
    description="Jinja file with the chat template, or 'chatml' for ChatML without a system turn of its own (a model's own "
    "template may add one to every example). If not set, the model's own, or the paper's if it has none.",
)
_VARIABLES: Any = Field(
    {}, description="Variables of the chat template, e.g. {enable_thinking: false}. Thinking counts towards max_tokens."
)


_SETTINGS_OF_PARAMETERS = {
    "model": "set model instead",
    "messages": "the messages are the questions",
    "max_tokens": "set max_tokens and token_limit of the section instead",
    "max_completion_tokens": "set max_tokens and token_limit of the section instead",
    "chat_template_kwargs": "set chat_template_kwargs of the section instead",
    "stream": "responses are not streamed",
    "n": "a request has one answer",
}


class Teacher(Section):
    """The model that writes instructions and their responses."""

    model: str = Field(
        description="Hugging Face id, local folder or embedded name of the teacher: smollm2-135m, smollm2-135m-pruned, "
        "gemma3-270m."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a Hugging Face id. If not set, main; ignored for folders."
    )
    prompt_style: Literal["chat", "completion"] = Field(
        "chat",
        description="How the teacher is prompted for instructions: 'chat', a request in the chat template (instruct models); "
        "'completion', a plain list of tagged instructions to continue (small or base models).",
    )
    chat_template: str | None = _TEMPLATE
    chat_template_kwargs: Variables = _VARIABLES


class Lora(Section):
    """Low-rank adaptation: the model's weights are frozen, and small matrices are trained."""

    rank: Count = Field(16, description="Rank of the matrices.")
    alpha: Count = Field(32, description="The product of the matrices is scaled by alpha / rank.")
    targets: tuple[str, ...] = Field(
        (), description="Names of the layers to adapt. If empty, every linear layer except the output layer."
    )


class Student(Section):
    """The model that is trained on the synthetic data."""

    model: str = Field(
        description="Hugging Face id, local folder or embedded name of the student: smollm2-135m, smollm2-135m-pruned, "
        "gemma3-270m."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a Hugging Face id. If not set, main; ignored for folders."
    )
    max_length: int = Field(
        1024,
        ge=32,
        description="Maximum length of an example (prompt and response), tokens, also of conversations that train NOMAD's "
        "teacher; the end of longer ones is cut, and they are counted.",
    )
    lora: Lora | None = Field(None, description="Train LoRA matrices. If not set, train all weights.")
    chat_template: str | None = _TEMPLATE
    chat_template_kwargs: Variables = _VARIABLES


class Endpoint(Section):
    """A model behind an OpenAI-compatible API. The key is read from the environment and stored nowhere."""

    model: str = Field(description="Name of the model at the API, e.g. gpt-4o.")
    base_url: str = Field(
        "https://api.openai.com/v1",
        pattern=r"^https?://",
        description="Address of the API, including /v1. For a local vLLM server: http://HOST:8000/v1.",
    )
    key_variable: VariableName = Field(
        "OPENAI_API_KEY",
        description="Environment variable that holds the key, where the jobs run. A server without keys needs none.",
    )
    concurrency: Count = Field(8, description="Maximum number of concurrent requests.")
    requests_per_minute: Count | None = Field(
        None, description="Maximum number of requests per minute, not counting retries. If not set, no limit."
    )
    timeout_seconds: float = Field(
        120.0, gt=0.0, description="Seconds after which a request without a response is retried."
    )
    retries: int = Field(
        6,
        ge=0,
        description="Retries of a request, with growing pauses, after 408, 409, 429, 5xx, a timeout, a lost connection or a "
        "response that does not follow the OpenAI API.",
    )
    max_tokens: Count = Field(1024, description="Maximum number of tokens of an answer, thinking included.")
    chat_template_kwargs: Variables = Field(
        {}, description="Variables of the chat template, sent to servers that take them (vLLM, SGLang)."
    )
    token_limit: Literal["max_tokens", "max_completion_tokens", "none"] = Field(
        "max_tokens",
        description="Parameter that limits the tokens of an answer; 'none' sends no limit. If the server refuses max_tokens, "
        "max_completion_tokens is tried.",
    )
    parameters: dict[str, Any] = Field(
        {},
        description="Parameters of each request, in place of ours, e.g. {reasoning_effort: low}; null leaves one out, e.g. "
        "{temperature: null, presence_penalty: null}. If the server refuses temperature, top_p, presence_penalty or logprobs "
        "that are not set here, they are left out, with a warning.",
    )
    structured_output: bool = Field(
        False,
        description="For a judge: ask for JSON by response_format and a schema, so that every complete answer has a verdict. "
        "Left out, with a warning, if the server refuses it. Published prompts never have it.",
    )
    unanswered_limit: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="Largest share of questions that the server may refuse, as too long or by moderation; they are counted "
        "as unanswered. If more than this share and more than five questions, or all, are refused, the stage fails.",
    )
    dollars_per_million_input_tokens: float = Field(
        0.0, ge=0.0, description="Price of a million tokens of the requests, to compute what is spent."
    )
    dollars_per_million_output_tokens: float = Field(
        0.0, ge=0.0, description="Price of a million tokens of the answers, to compute what is spent."
    )
    spending_cap_dollars: float | None = Field(
        None,
        gt=0.0,
        description="Most that this section may spend in a run folder: each seed and each transfer student of a study has "
        "its own. The stage fails before the first request that could exceed it; answers are kept. If not set, no limit.",
    )

    @model_validator(mode="after")
    def _cap_needs_prices(self) -> "Endpoint":
        prices = {"dollars_per_million_input_tokens", "dollars_per_million_output_tokens"}
        if self.spending_cap_dollars is not None and not prices <= self.model_fields_set:
            raise ValueError(f"spending_cap_dollars needs {' and '.join(sorted(prices))}; set both (0 if free)")
        if self.spending_cap_dollars is not None and self.token_limit == "none":
            raise ValueError("spending_cap_dollars needs a limit of tokens; set token_limit to the parameter's name")
        return self

    @model_validator(mode="after")
    def _parameters_do_not_replace_settings(self) -> "Endpoint":
        refuse_names(self.parameters, _SETTINGS_OF_PARAMETERS, "parameters")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine an answer."""
        settings = {"model", "base_url", "max_tokens"}
        optional = ("chat_template_kwargs", "parameters", "structured_output")
        settings |= {name for name in optional if getattr(self, name)}
        settings |= {"token_limit"} if self.token_limit == "none" else set()
        return self.model_dump(mode="json", include=settings)
