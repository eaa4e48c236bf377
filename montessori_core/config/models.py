"""Teacher, student, and models behind an API."""

from typing import Any, Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Section


class Teacher(Section):
    """The model that writes instructions and their responses."""

    model: str = Field(
        description="Hugging Face id, local folder or embedded name of the teacher: smollm2-135m, smollm2-135m-pruned, "
        "gemma3-270m."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id; none for a folder.")
    prompt_style: Literal["chat", "completion"] = Field(
        "chat",
        description="How instructions are asked for: 'chat' puts the request in the chat template (instruct "
        "models); 'completion' lets the model continue a plain list of tagged instructions (small or base models).",
    )


class Lora(Section):
    """Low-rank adaptation: the student's weights stay, small matrices beside them are trained."""

    rank: Count = Field(16, description="Rank of the matrices.")
    alpha: Count = Field(32, description="Their product is scaled by alpha / rank.")
    targets: tuple[str, ...] = Field(
        (), description="Names of the layers that get them; none takes every linear layer but the vocabulary's."
    )


class Student(Section):
    """The model that the synthetic data trains."""

    model: str = Field(
        description="Hugging Face id, local folder or embedded name of the student: smollm2-135m, smollm2-135m-pruned, "
        "gemma3-270m."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id; none for a folder.")
    max_length: int = Field(
        1024, ge=32, description="Tokens of an example (prompt and response); longer ones are cut and recorded."
    )
    lora: Lora | None = Field(None, description="Train LoRA matrices; none trains all weights.")


class Endpoint(Section):
    """A model behind an OpenAI-compatible API. Its key is taken from the environment and written nowhere."""

    model: str = Field(description="The model's name at the API, e.g. gpt-4o.")
    base_url: str = Field(
        "https://api.openai.com/v1",
        pattern=r"^https?://",
        description="Address of the API, /v1 included; a local vLLM server's is http://HOST:8000/v1.",
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key, where the jobs run; a server without keys needs none.",
    )
    concurrency: Count = Field(8, description="Most requests at a time.")
    requests_per_minute: Count | None = Field(
        None, description="Most questions put in a minute; those repeated after a fault come on top. None for no limit."
    )
    timeout_seconds: float = Field(120.0, gt=0.0, description="Seconds until a request without an answer is repeated.")
    retries: int = Field(
        6,
        ge=0,
        description="Times a request is repeated, with growing pauses, after 408, 409, 429, 5xx, a time-out, a lost "
        "connection or an answer that is not of the protocol.",
    )
    max_tokens: Count = Field(1024, description="Most tokens of an answer.")
    dollars_per_million_input_tokens: float = Field(0.0, ge=0.0, description="Price, for the account kept.")
    dollars_per_million_output_tokens: float = Field(0.0, ge=0.0, description="Price, for the account kept.")
    spending_cap_dollars: float | None = Field(
        None, gt=0.0, description="A stage that could pass this sum with its next request stops with what it has."
    )

    @model_validator(mode="after")
    def _cap_needs_prices(self) -> "Endpoint":
        if self.spending_cap_dollars is not None and not (
            self.dollars_per_million_input_tokens or self.dollars_per_million_output_tokens
        ):
            raise ValueError("spending_cap_dollars needs dollars_per_million_input_tokens and ..._output_tokens")
        return self

    def identity(self) -> dict[str, Any]:
        """What decides an answer: all but limits, prices and the name of the key."""
        return self.model_dump(mode="json", include={"model", "base_url", "max_tokens"})
