"""The filters of `synthesis.filters`: a list of named filters with their settings, applied in order."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, GetJsonSchemaHandler, Tag, model_validator
from pydantic_core import CoreSchema

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
    max_characters: Count | None = Field(400, description="Maximum length, characters. If null, any.")
    min_words: Count | None = Field(
        None,
        description="Minimum length, words; in Chinese, Japanese, Thai and other scripts without spaces a word is a "
        "character. If null, any.",
    )
    max_words: Count | None = Field(None, description="Maximum length, words. If null, any.")


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
    """Rejects instructions in another script than those of the list."""

    name: Literal["script"] = Field("script", description=_NAME)
    scripts: tuple[Script, ...] = Field(("latin",), description="Scripts, such as han and kana for Japanese.")
    min_share: Probability = Field(0.7, description="Minimum share of the letters that are of these scripts.")

    @model_validator(mode="after")
    def _some_script(self) -> "ScriptFilter":
        if not self.scripts:
            raise ValueError(
                "scripts is empty: it would reject every instruction; name a script, or leave the filter out"
            )
        return self


class RougeFilter(Section):
    """Rejects instructions that are too similar to a demonstration of their prompt or to an accepted instruction."""

    name: Literal["rouge_l"] = Field("rouge_l", description=_NAME)
    maximum: Probability = Field(0.7, description="Maximum ROUGE-L F with any of them (Section 4).")


class OwnFilter(Section):
    """A filter of your own, see synthesis.md."""

    name: str = Field(
        pattern=r"^[\w.]+:\w+$",
        description="module:NAME of the filter; the module is in a folder on the driver's PYTHONPATH.",
    )
    settings: dict[str, Any] = Field({}, description="Its settings; the filter declares which.")


_SHIPPED = (LengthFilter, TextOnlyFilter, WordsFilter, FirstCharacterFilter, ScriptFilter, RougeFilter)
_NAMES = tuple(kind.model_fields["name"].default for kind in _SHIPPED)


def _name_of(filter: Any) -> str:
    name = filter["name"] if isinstance(filter, dict) else filter.name
    return str(name) if name in _NAMES else "module:NAME"


def _check_name(value: Any) -> Any:
    """Read a name as a filter with default settings; refuse an unknown name."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, dict):
        name = value.get("name")
        if name not in _NAMES and not (isinstance(name, str) and ":" in name):
            available = f"available: {', '.join(_NAMES)}, or your own as module:NAME"
            raise ValueError(f"no filter {name!r}; {available}" if "name" in value else f"name is missing; {available}")
    elif not isinstance(value, Section):
        raise ValueError("a filter is a name, or a mapping with a name and settings")
    return value


class _Named:
    """Allow a name alone in the JSON schema, and write `anyOf`, which Prefect's form can show, in place of `oneOf`."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [*handler(schema)["oneOf"], {"type": "string", "title": "Name"}]}


FilterSettings = Annotated[
    Annotated[LengthFilter, Tag("length")]
    | Annotated[TextOnlyFilter, Tag("text_only")]
    | Annotated[WordsFilter, Tag("words")]
    | Annotated[FirstCharacterFilter, Tag("first_character")]
    | Annotated[ScriptFilter, Tag("script")]
    | Annotated[RougeFilter, Tag("rouge_l")]
    | Annotated[OwnFilter, Tag("module:NAME")],
    Discriminator(_name_of),
    _Named(),
    BeforeValidator(_check_name),
]
"""The settings of one filter, found by its name."""
