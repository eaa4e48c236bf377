"""How data is generated and filtered."""

from typing import Literal

from pydantic import Field, model_validator

from montessori_core.config.section import Count, Probability, Section


class Sampling(Section):
    """Decoding parameters of one kind of generation (paper, Table 5)."""

    temperature: float = Field(
        1.0, ge=0.0, description="Softmax temperature; 0 takes the most probable token every time."
    )
    top_p: float = Field(0.9, gt=0.0, le=1.0, description="Nucleus: smallest set of tokens with this probability.")
    presence_penalty: float = Field(
        1.0, ge=-2.0, le=2.0, description="Subtracted from the logit of every token generated before."
    )
    repetition_penalty: float = Field(
        1.0, gt=0.0, description="Divides the logits of tokens in the prompt or generated before; 1 is off."
    )
    max_tokens: Count = Field(1024, description="Most tokens generated.")


class Filters(Section):
    """Which instructions are kept (Section 4.1 of the design; every rejection is counted by its reason)."""

    min_characters: int = Field(6, ge=1, description="Shortest instruction kept, characters.")
    max_characters: int = Field(400, ge=1, description="Longest instruction kept, characters.")
    max_rouge_l: Probability = Field(
        0.7,
        description="Highest ROUGE-L F against any accepted instruction and the prompt's own demonstrations.",
    )
    keep_newlines: bool = Field(
        True,
        description="Keep the line breaks of code and lists; false collapses every blank to one space as the "
        "authors' code does.",
    )


class Synthesis(Section):
    """How the teacher is prompted and what is kept of its output."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="Generation engine; 'auto' takes vLLM where it is installed, else transformers."
    )
    request: Literal["own", "paper"] = Field(
        "own",
        description="Words of the request in prompt_style: chat. 'own' asks for the task alone, one to three sentences long; "
        "'paper' is Figure 13: an explanation first, then an instruction of any length, with its input.",
    )
    samples_per_prompt: Count = Field(4, description="Instructions generated for each prompt.")
    seed_demonstrations: int = Field(6, ge=0, description="Demonstrations a prompt takes from the seed pool.")
    synthetic_demonstrations: int = Field(
        2, ge=0, description="Demonstrations a prompt takes from the last iteration; from the seeds while none."
    )
    instruction: Sampling = Field(
        Sampling(temperature=1.0),
        description="Decoding of instructions. Table 5 prints a repetition penalty of 1.5, which the authors' code does "
        "not set: it counts the prompt, whose demonstrations end with the closing tag that an instruction must end with.",
    )
    response: Sampling = Field(Sampling(temperature=0.6), description="Decoding of responses.")
    filters: Filters = Field(Filters(), description="Which instructions are kept.")
    oversampling: float = Field(
        1.3,
        ge=1.0,
        description="First round: candidates generated for each example wanted. Later rounds fill what the "
        "filters removed, at the last round's acceptance, and a fifth more: acceptance falls as the accepted set grows.",
    )
    max_rounds: Count = Field(6, description="Rounds of generation before too low an acceptance is an error.")
    prompts_per_shard: Count = Field(256, description="Most prompts in one shard of instruction generation.")
    instructions_per_shard: Count = Field(512, description="Most instructions in one shard of response generation.")

    @model_validator(mode="after")
    def _some_demonstrations(self) -> "Synthesis":
        if self.seed_demonstrations + self.synthetic_demonstrations == 0:
            raise ValueError(
                "seed_demonstrations and synthetic_demonstrations are both 0: a prompt needs at least one demonstration"
            )
        return self
