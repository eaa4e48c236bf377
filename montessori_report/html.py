"""A page: sections of figures and tables in one self-contained HTML file, and each figure's data beside it.

A page loads nothing from a network. Every text that a model wrote is data on it: Jinja escapes it, Plotly never sees it, and
the page's script shows it as text only. The content security policy allows only the page's two scripts, by their hashes, so
that even text that slipped through could not run.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from montessori_core.files import commit
from montessori_report.figures import Figure, slug

_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Block:
    """Figures and the tables with their numbers, under an optional heading."""

    figures: Sequence[Figure]
    tables: Sequence[Table] = ()
    heading: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: of its HTML element.
        title: of the section.
        blocks: its content.
        introduction: a sentence before the blocks.
        note: a sentence after the blocks.
        absent: the sentence shown if there are no blocks.
        template: of further content, before the blocks.
    """

    id: str
    title: str
    blocks: Sequence[Block] = ()
    introduction: str = ""
    note: str = ""
    absent: str = ""
    template: str | None = None

    def slug(self, block: Block, figure: Figure) -> str:
        """Return the name of a figure's data, unique on the page."""
        name = slug(figure.title)
        for before in (slug(block.heading or ""), self.id):
            name = name if name.startswith(before) else f"{before}-{name}"
        return name


@dataclass(frozen=True)
class Page:
    """A page ready to be written: its HTML, and the data of its figures as CSV, by name."""

    html: str
    data: Mapping[str, str]

    def write(self, path: Path) -> None:
        """Write `NAME.html`, and a CSV file for each figure in `NAME-data/` beside it; other files there stay."""
        folder = path.with_name(f"{path.stem}-data")
        folder.mkdir(parents=True, exist_ok=True)
        with commit(path) as temporary:
            temporary.write_text(self.html, encoding="utf-8")
        for name, text in self.data.items():
            with commit(folder / f"{name}.csv", durable=False) as temporary:
                temporary.write_text(text, encoding="utf-8")


def build_page(
    product: str,
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    content: Mapping[str, object] | None = None,
) -> Page:
    """Assemble a page.

    Args:
        product: the kind of page.
        title: of the page.
        facts: names and values for the page's header.
        sections: of the page, in order.
        content: variables of the sections' own templates.
    """
    plotly, script = get_plotlyjs(), _asset("script.js")
    environment = Environment(
        loader=PackageLoader("montessori_report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    html = environment.get_template("page.html.j2").render(
        product=product,
        title=title,
        facts=facts,
        sections=sections,
        style=Markup(_asset("style.css")),
        scripts=[Markup(plotly), Markup(script)],
        script_hashes=[_policy_hash(text) for text in (plotly, script)],
        **(content or {}),
    )
    data = {
        section.slug(block, figure): figure.csv
        for section in sections
        for block in section.blocks
        for figure in block.figures
    }
    return Page(html, data)


def visible(text: str) -> str:
    """Replace control characters by visible signs; line breaks and tabs stay."""
    return text.translate(_VISIBLE)


def _asset(name: str) -> str:
    return files("montessori_report").joinpath("assets", name).read_text(encoding="utf-8")


def _policy_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
