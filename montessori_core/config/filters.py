"""The filters of `synthesis.filters`: a list of named filters with their settings, applied in order."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from montessori_core.config.named import OWN, NamesAlone, read_named, tag_of
from montessori_core.config.section import Count, Probability, Section

_NAME = "Name of the filter."
_AUTHORS_WORDS = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps")
Script = Literal[
    "arabic", "armenian", "bengali", "cyrillic", "devanagari", "georgian", "greek", "gujarati", "gurmukhi", "han",
    "hangul", "hebrew", "kana", "khmer", "latin", "lao", "malayalam", "myanmar", "tamil", "telugu", "thai",
]  # fmt: skip


class LengthFilter(Section):
    """Rejects instructions that are too short or too long, in characters, in words, or both."""

    name: Literal["length"] = Field("length", description=_NAME)
    min_characters: Count = Field(6, description="Minimum length, characters.")
    max_characters: Count | None = Field(400, description="Maximum length, characters. If null, no limit.")
    min_words: Count | None = Field(
        None,
        description="Minimum length, words; in Chinese, Japanese, Thai and other scripts without spaces a word is a "
        "character. If null, no limit.",
    )
    max_words: Count | None = Field(None, description="Maximum length, words. If null, no limit.")

    @model_validator(mode="after")
    def _some_length(self) -> "LengthFilter":
        for unit in ("characters", "words"):
            shortest, longest = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if shortest is not None and longest is not None and shortest > longest:
                raise ValueError(f"min_{unit} ({shortest}) is above max_{unit} ({longest}): no instruction would pass")
        return self


class TextOnlyFilter(Section):
    """Rejects instructions that text alone cannot answer: they ask for images, sound, files or the web. English only."""

    name: Literal["text_only"] = Field("text_only", description=_NAME)


class WordsFilter(Section):
    """Rejects instructions that have a word or phrase of a list, whatever it means there."""

    name: Literal["words"] = Field("words", description=_NAME)
    words: tuple[str, ...] = Field(
        (*_AUTHORS_WORDS, "draw", "plot", "go to"),
        min_length=1,
        description="Words and phrases, in any case and any language. The default is the list of the authors' code.",
    )

    @model_validator(mode="after")
    def _phrases_have_words(self) -> "WordsFilter":
        if empty := [phrase for phrase in self.words if not any(map(str.isalnum, phrase))]:
            raise ValueError(f"words: {empty[0]!r} has neither letters nor digits; remove it")
        return self


class FirstCharacterFilter(Section):
    """Rejects instructions that start with neither a letter nor a digit."""

    name: Literal["first_character"] = Field("first_character", description=_NAME)
    ascii: bool | None = Field(
        None,
        description="Accept only the letters A to Z, a to z and the digits 0 to 9, as the authors' code does. False accepts "
        "those of any script, also after an opening quotation mark, bracket, ¿ or ¡. If null, true for English.",
    )


class ScriptFilter(Section):
    """Rejects instructions that are not written in the scripts of a list."""

    name: Literal["script"] = Field("script", description=_NAME)
    scripts: tuple[Script, ...] = Field(("latin",), description="Scripts, such as han and kana for Japanese.")
    min_share: Probability = Field(
        0.7, description="Minimum share of an instruction's letters that are of these scripts."
    )

    @model_validator(mode="after")
    def _some_script(self) -> "ScriptFilter":
        if not self.scripts:
            raise ValueError(
                "scripts is empty: it would reject every instruction; name a script, or leave the filter out"
            )
        return self


class LanguageFilter(Section):
    """Rejects instructions in languages not listed. Keeps instructions too short to classify."""

    name: Literal["language"] = Field("language", description=_NAME)
    languages: tuple[str, ...] = Field(("en",), description="ISO 639 codes, such as en, de or zh; of 139 languages.")

    @model_validator(mode="after")
    def _some_language(self) -> "LanguageFilter":
        if not self.languages:
            raise ValueError("languages is empty: it would reject every instruction; name one, or leave the filter out")
        return self


class RougeFilter(Section):
    """Rejects instructions that are too similar to a demonstration of their prompt or to an accepted instruction."""

    name: Literal["rouge_l"] = Field("rouge_l", description=_NAME)
    maximum: Probability = Field(0.7, description="Maximum ROUGE-L F with any of them (Section 4).")


class SemanticFilter(Section):
    """Rejects instructions whose embedding (mean of a model's last hidden states) is near a seed's or an accepted one's."""

    name: Literal["semantic"] = Field("semantic", description=_NAME)
    model: str = Field(
        description="Folder or Hugging Face id of the embedding model, loaded by transformers from safetensors, e.g. "
        "sentence-transformers/all-MiniLM-L6-v2; or an embedded name."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id. If not set, main.")
    maximum: float = Field(0.9, ge=-1.0, le=1.0, description="Maximum cosine similarity with any of them.")
    max_length: Count = Field(256, description="Tokens of an instruction that are read; longer ones are cut.")


class JudgeFilter(Section):
    """Rejects examples that the model of the section `judge` scores too low; it adds up six points (Figure 14)."""

    name: Literal["judge"] = Field("judge", description=_NAME)
    minimum: float = Field(4.0, ge=0.0, le=6.0, description="Lowest score that is kept, 0 to 6.")
    keep_unscored: bool = Field(
        False,
        description="Keep examples for which the judge gives no score that can be read. If false, they are rejected.",
    )


class CodeRunsFilter(Section):
    """Rejects examples whose Python code blocks in the response do not run. The code is a model's: read security.md first."""

    name: Literal["code_runs"] = Field("code_runs", description=_NAME)
    run_untrusted_code: bool = Field(
        False,
        description="Must be set to true: jobs run code that a model wrote. It runs as your account, with limits of time, "
        "memory and file size, an empty environment and a temporary folder, without network and with read-only files.",
    )
    seconds: Count = Field(
        5, description="Time limit of the code of a response: seconds of CPU time, and twice as many in all."
    )
    memory_mb: int = Field(512, ge=64, description="Memory limit of the code of a response (address space), MB.")
    need_code: bool = Field(False, description="Also reject responses without a Python code block.")
    need_isolation: bool = Field(
        True,
        description="Fail where the system has no namespaces (unshare): without them the code has the network, and can "
        "change your files. False runs it anyway.",
    )

    @model_validator(mode="after")
    def _is_asked_for(self) -> "CodeRunsFilter":
        if not self.run_untrusted_code:
            raise ValueError(
                "code_runs runs code that a model wrote, under your account; if you accept the risk (security.md), set "
                "run_untrusted_code: true, else remove the filter"
            )
        return self


class OwnFilter(Section):
    """A filter of your own, see synthesis.md."""

    name: str = Field(
        pattern=r"^[\w.]+:\w+$",
        description="module:NAME of the filter; the module is in a folder on the driver's PYTHONPATH.",
    )
    settings: dict[str, Any] = Field({}, description="Its settings; the filter declares which.")


_NAMES = (
    "length",
    "text_only",
    "words",
    "first_character",
    "script",
    "language",
    "rouge_l",
    "semantic",
    "judge",
    "code_runs",
)

FilterSettings = Annotated[
    Annotated[LengthFilter, Tag("length")]
    | Annotated[TextOnlyFilter, Tag("text_only")]
    | Annotated[WordsFilter, Tag("words")]
    | Annotated[FirstCharacterFilter, Tag("first_character")]
    | Annotated[ScriptFilter, Tag("script")]
    | Annotated[LanguageFilter, Tag("language")]
    | Annotated[RougeFilter, Tag("rouge_l")]
    | Annotated[SemanticFilter, Tag("semantic")]
    | Annotated[JudgeFilter, Tag("judge")]
    | Annotated[CodeRunsFilter, Tag("code_runs")]
    | Annotated[OwnFilter, Tag(OWN)],
    Discriminator(tag_of(_NAMES)),
    NamesAlone(),
    BeforeValidator(read_named("filter", _NAMES)),
]
"""The settings of one filter, found by its name."""
