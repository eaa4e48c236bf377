"""Teacher, student, and models behind an API."""

from typing import Any, Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Section

Variables = dict[str, str | int | float | bool]
_TEMPLATE: Any = Field(
    None, description="Jinja file with the chat template. If not set, the model's own, or the paper's if it has none."
)
_VARIABLES: Any = Field(
    {}, description="Variables of the chat template, e.g. {enable_thinking: false}. Thinking uses up max_tokens."
)


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
        description="Maximum length of an example (prompt and response), tokens; longer ones are truncated and recorded.",
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
    key_variable: str = Field(
        "OPENAI_API_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key, where the jobs run. A server without keys needs none.",
    )
    concurrency: Count = Field(8, description="Maximum number of concurrent requests.")
    requests_per_minute: Count | None = Field(
        None, description="Maximum number of requests per minute, not counting retries. If not set, no limit."
    )
    timeout_seconds: float = Field(
        120.0, gt=0.0, description="Timeout of a request, after which it is retried, seconds."
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
    dollars_per_million_input_tokens: float = Field(0.0, ge=0.0, description="Price, to compute spending.")
    dollars_per_million_output_tokens: float = Field(0.0, ge=0.0, description="Price, to compute spending.")
    spending_cap_dollars: float | None = Field(
        None,
        gt=0.0,
        description="Spending limit of a run: it stops before the first request that could exceed it, and keeps the answers.",
    )

    @model_validator(mode="after")
    def _cap_needs_prices(self) -> "Endpoint":
        if self.spending_cap_dollars is not None and not (
            self.dollars_per_million_input_tokens or self.dollars_per_million_output_tokens
        ):
            raise ValueError("spending_cap_dollars needs dollars_per_million_input_tokens and ..._output_tokens")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine an answer."""
        variables = {"chat_template_kwargs"} if self.chat_template_kwargs else set[str]()
        return self.model_dump(mode="json", include={"model", "base_url", "max_tokens"} | variables)
