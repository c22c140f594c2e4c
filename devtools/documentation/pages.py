"""The pages of docs/ that are made from the code, by path."""

from collections.abc import Callable

from devtools.documentation import decisions, findings, reference

NOTE = "<!-- Made from the code by `make docs`. -->"
PAGES: dict[str, Callable[[], str]] = {
    "adr/README.md": decisions.page,
    "reference/components.md": reference.components_page,
    "reference/errors.md": reference.errors_page,
    "reference/findings.md": findings.page,
    "reference/metrics.md": reference.metrics_page,
    "reference/routes.md": reference.routes_page,
    "reference/settings.md": reference.settings_page,
}


def text_of(name: str) -> str:
    """Return the text of a page."""
    return f"{NOTE}\n\n{PAGES[name]()}\n"
