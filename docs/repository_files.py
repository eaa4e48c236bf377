"""MkDocs hook: the site carries the repository's files that pages refer to, so that one link serves both.

A page links to `../docker/compose.yaml`, which is right where the repository's Markdown is read. The site has no such folder;
here the file becomes a page of the site, below `repository/`, and the link leads there.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
_OWN_PAGES = ("CHANGELOG.md", "LICENSE", "CITATION.cff")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files that some page links to, and those that have a place in the navigation."""
    root = Path(config.config_file_path).parent
    linked = {target for file in files.documentation_pages() for target in _OUTSIDE.findall(file.content_string)}
    for target in sorted(linked | set(_OWN_PAGES)):
        files.append(File.generated(config, _page(target), content=_content(root / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of `docs/` lead to the pages that `on_files` made."""
    return _OUTSIDE.sub(lambda found: f"]({_page(found[1])}", markdown)


def _page(target: str) -> str:
    return f"repository/{target}" if target.endswith(".md") else f"repository/{target}.md"


def _content(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".md" else f"# {path.name}\n\n~~~~{path.suffix[1:]}\n{text}~~~~\n"
