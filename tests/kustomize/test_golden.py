"""What every overlay renders to, kept to be reviewed: a change of it is a change of what runs."""

import yaml


def test_an_overlay_renders_to_what_was_reviewed(overlay, tree):
    golden = tree.root / "tests/kustomize/golden" / f"{overlay.path.name}.yaml"
    reviewed = tuple(yaml.load_all(golden.read_text(), yaml.CSafeLoader))
    assert overlay.objects == reviewed, "`make render` writes what there is now; review the difference and commit it"


def test_there_is_one_for_every_overlay(tree):
    files = {path.stem for path in (tree.root / "tests/kustomize/golden").iterdir()}
    assert files == {folder.name for folder in tree.overlays}
