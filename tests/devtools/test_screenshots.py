"""The pictures of the page in the documentation."""

import shutil
import struct
from pathlib import Path

import pytest

from devtools import screenshots
from devtools.paths import ROOT

CHROMIUM = shutil.which("chromium")
IMAGES = ROOT / "docs" / "images"


def size(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:])
    return width, height


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_screenshots_are_the_pictures_of_the_documentation(tmp_path: Path) -> None:
    assert CHROMIUM
    screenshots.take(tmp_path, CHROMIUM)
    taken = {picture.name: size(picture) for picture in tmp_path.iterdir()}
    assert taken == {picture.name: size(picture) for picture in IMAGES.glob("playground*.png")}
    assert set(taken.values()) == {(1280, 800), (390, 844)}
