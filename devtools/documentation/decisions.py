"""The list of decisions, from the titles in docs/adr."""

from devtools.documentation.tables import table
from devtools.paths import ROOT


def page() -> str:
    """Return the table of all decisions."""
    rows = []
    for file in sorted((ROOT / "docs" / "adr").glob("[0-9]*.md")):
        number, _, title = file.read_text().partition("\n")[0].removeprefix("# ").partition(". ")
        rows.append((number, f"[{title}]({file.name})"))
    text = "What was decided, with the reasons and what was rejected."
    return f"# Decisions\n\n{text}\n\n{table(('Number', 'Decision'), rows)}"
