"""Write the pages of docs/ that are made from the code: `python -m devtools.documentation`; `make docs` does it too."""

from devtools.documentation import pages
from devtools.paths import ROOT


def main() -> None:
    """Write every page whose text has changed."""
    for name in pages.PAGES:
        path, text = ROOT / "docs" / name, pages.text_of(name)
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
