"""Rendered overlays equal the reviewed files in golden/."""

import yaml

from tests.kustomize.conftest import GOLDEN, OVERLAYS, Rendered


def test_overlay_renders_to_its_golden_file(overlay: Rendered) -> None:
    golden = (GOLDEN / f"{overlay.path.name}.yaml").read_text()
    reviewed = tuple(yaml.load_all(golden, yaml.CSafeLoader))
    assert overlay.objects == reviewed, "`make render` rewrites the files; review the difference and commit it"


def test_every_overlay_has_a_golden_file() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {folder.name for folder in OVERLAYS}
