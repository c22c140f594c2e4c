"""A hook of MkDocs: relative links to files outside of docs/ become URLs of the repository."""

import logging
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from devtools.paths import ROOT

log = logging.getLogger("mkdocs.plugins.repository_links")
"""A warning below `mkdocs` fails a strict build."""
_FENCE = re.compile(r"(^ *```.*?^ *```\s*?$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?P<path>\.\./[^)#\s]*)(?P<anchor>#[^)\s]*)?(?=\))")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - MkDocs' names
    """Rewrite the links of a page before it is converted."""
    return rewrite(markdown, page.file.src_uri, config.extra["repository"])


def rewrite(markdown: str, source: str, repository: str) -> str:
    """Return a page with links that leave docs/ as URLs of the repository's default branch.

    Args:
        markdown: text of the page.
        source: path of the page below docs/.
        repository: URL of the repository.
    """

    def replace(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link["path"]))
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).exists():
            log.warning("%s: the repository has no %s", source, path)
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{repository}/{kind}/HEAD/{path}{link['anchor'] or ''}"

    parts = _FENCE.split(markdown)
    return "".join(part if number % 2 else _LINK.sub(replace, part) for number, part in enumerate(parts))
