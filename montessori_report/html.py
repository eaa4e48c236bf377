"""Pages: sections of figures and tables in one self-contained HTML file, and a CSV file per figure.

A page loads nothing from a network. Text written by a model is untrusted: Jinja escapes it, Plotly never gets it, and the
page's script inserts it as text only. The content security policy allows only the page's two scripts, by hash, so even
unescaped text could not run.
"""

import base64
import hashlib
import itertools
import re
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
_OWN = re.compile(rb'<meta name="generator" content="Montessori">|Montessori[^<]*</title>')


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column has the row names."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Block:
    """Figures and tables under an optional heading."""

    figures: Sequence[Figure]
    tables: Sequence[Table] = ()
    heading: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: id of the HTML element.
        title: heading of the section.
        blocks: figures and tables.
        introduction: text before the blocks.
        note: text after the blocks.
        absent: text shown if there are no blocks.
        template: Jinja template of additional content, before the blocks.
    """

    id: str
    title: str
    blocks: Sequence[Block] = ()
    introduction: str = ""
    note: str = ""
    absent: str = ""
    template: str | None = None

    def slug(self, block: Block, figure: Figure) -> str:
        """Return the name of a figure in a block for its CSV file."""
        name = slug(figure.title)
        for prefix in (slug(block.heading or ""), self.id):
            name = name if name.startswith(prefix) else f"{prefix}-{name}".strip("-")
        return name


@dataclass(frozen=True)
class Page:
    """A rendered page: its HTML, and the data of its figures as CSV by name."""

    html: str
    data: Mapping[str, str]

    def write(self, path: Path) -> None:
        """Write `NAME.html` and a CSV file per figure in `NAME-data/`; other files in that folder are kept."""
        folder = path.with_name(f"{path.stem}-data")
        folder.mkdir(parents=True, exist_ok=True)
        with commit(path) as temporary:
            temporary.write_text(self.html, encoding="utf-8")
        for name, text in self.data.items():
            with commit(folder / f"{name}.csv", durable=False) as temporary:
                temporary.write_text(text, encoding="utf-8")


def is_page(path: Path) -> bool:
    """Return whether a file is a page of this package; one of an earlier version is known by its title."""
    with path.open("rb") as stream:
        return _OWN.search(stream.read(4096)) is not None


def build_page(
    product: str,
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    content: Mapping[str, object] | None = None,
) -> Page:
    """Render a page.

    Args:
        product: the kind of page, shown above the title.
        title: title of the page.
        facts: names and values for the page's header.
        sections: sections in order.
        content: variables of the sections' templates.
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
    figures = _by_name(sections)
    names = {id(figure): name for name, figure in figures.items()}
    html = environment.get_template("page.html.j2").render(
        product=product,
        title=title,
        facts=facts,
        sections=sections,
        name_of=lambda figure: names[id(figure)],
        style=Markup(_asset("style.css")),
        scripts=[Markup(plotly), Markup(script)],
        script_hashes=[_policy_hash(text) for text in (plotly, script)],
        **(content or {}),
    )
    return Page(html, {name: figure.csv for name, figure in figures.items()})


def _by_name(sections: Sequence[Section]) -> dict[str, Figure]:
    """Return the figures of a page by the names of their CSV files; a number tells equal names apart."""
    figures: dict[str, Figure] = {}
    for section in sections:
        for block in section.blocks:
            for figure in block.figures:
                name = section.slug(block, figure)
                numbered = (f"{name}-{number}" for number in itertools.count(2))
                figures[next(free for free in itertools.chain([name], numbered) if free not in figures)] = figure
    return figures


def visible(text: str) -> str:
    """Replace control characters, except line breaks and tabs, with visible symbols."""
    return text.translate(_VISIBLE)


def _asset(name: str) -> str:
    return files("montessori_report").joinpath("assets", name).read_text(encoding="utf-8")


def _policy_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
