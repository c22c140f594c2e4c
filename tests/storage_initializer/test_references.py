"""Properties of references and of the path guard."""

import posixpath
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from snapshot_format.reference import LONGEST_REVISION, DirectoryReference, HubReference, escape, parse
from storage_initializer.errors import InvalidReference, RefusedSnapshot
from storage_initializer.sources import file_selection
from storage_initializer.sources.file_selection import File

NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._]{0,20}[A-Za-z0-9])?", fullmatch=True).filter(lambda n: ".." not in n)
REVISIONS = st.from_regex(r"[A-Za-z0-9_]{1,12}(/[A-Za-z0-9_+-]{1,12}){0,3}", fullmatch=True).filter(
    lambda revision: not any(part.startswith("-") for part in revision.split("/"))
)
COMMITS = st.from_regex(r"[0-9a-f]{40}", fullmatch=True)
PATHS = st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=10), min_size=1, max_size=4)
"""Surrogates included, as a listing in JSON may hold them; no directory has them in its name."""
DIRECTORIES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=10), min_size=1, max_size=4
)


@given(NAMES, NAMES, st.one_of(REVISIONS, COMMITS), st.sampled_from(":@"))
def test_a_hub_reference_is_read_as_it_was_written(owner: str, model: str, revision: str, separator: str) -> None:
    reference = parse(f"hf://{owner}/{model}{separator}{revision}")
    assert reference == HubReference(owner, model, revision)
    assert parse(str(reference)) == reference
    assert reference.slug == f"{owner}--{model}"


@given(NAMES, NAMES)
def test_without_a_revision_the_branch_is_main(owner: str, model: str) -> None:
    assert parse(f"hf://{owner}/{model}") == HubReference(owner, model, "main")


@given(COMMITS)
def test_a_commit_is_recognised_in_either_case(commit: str) -> None:
    for text in (commit, commit.upper()):
        reference = parse(f"hf://demo/arithmetic:{text}")
        assert reference.is_commit
        assert reference.revision == commit


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_one_sentence(text: str) -> None:
    refusals: list[str] = []
    for candidate in (text, f"hf://{text}", f"hf://demo/arithmetic:{text}", f"file://{text}", f"file:///{text}"):
        try:
            reference = parse(candidate)
        except InvalidReference as error:
            refusals.append(str(error))
            continue
        for name in (reference.slug, escape(reference.revision)):
            assert name == PurePosixPath(name).name
            assert not name.startswith(".")
            assert len(name.encode()) < 256
    assert not any("\n" in refusal for refusal in refusals)


@given(REVISIONS)
def test_a_refs_file_name_leads_back_to_its_revision(revision: str) -> None:
    assert unquote(escape(revision)) == revision
    assert "/" not in escape(revision)


@given(DIRECTORIES)
def test_a_directory_reference_keeps_the_directory(parts: list[str]) -> None:
    path = Path("/", *parts)
    normal = Path(posixpath.normpath(path))
    assume(normal.name and len(quote(normal.name, safe="")) <= LONGEST_REVISION)
    assert parse(f"file://{quote(str(path))}") == DirectoryReference(normal)


@given(PATHS, st.sampled_from(["", "/"]))
def test_a_guarded_path_stays_below_the_directory_it_is_joined_to(parts: list[str], root: str) -> None:
    path = root + "/".join(parts)
    try:
        file_selection.guard(path, "hf://demo/arithmetic")
    except RefusedSnapshot:
        return
    joined = posixpath.normpath(posixpath.join("/snapshot", path))
    assert joined == f"/snapshot/{path}"
    assert "\\" not in path


@pytest.mark.parametrize(
    "path", ["", "/", "..", "../x", "x/..", "a//b", "./x", "x/", "C:/x", "x\\y", "a\nb", "x" * 250]
)
def test_the_guard_refuses(path: str) -> None:
    with pytest.raises(RefusedSnapshot):
        file_selection.guard(path, "hf://demo/arithmetic")


@given(st.lists(st.builds(File, path=st.text(max_size=20), size_bytes=st.integers(0), sha256=st.just("0" * 64))))
def test_a_plan_holds_safe_visible_files_only(listing: list[File]) -> None:
    needed = [File("config.json", 2, "0" * 64), File("model.safetensors", 2, "0" * 64)]
    try:
        chosen = file_selection.make([*listing, *needed], "hf://demo/arithmetic")
    except RefusedSnapshot:
        return
    for file in chosen.files:
        file_selection.guard(file.path, "hf://demo/arithmetic")
        assert not any(part.startswith(".") for part in file.path.split("/"))


def test_the_fingerprint_depends_on_every_path_size_and_checksum() -> None:
    file = File("config.json", 2, "0" * 64)
    prints = {
        file_selection.Plan((file,)).fingerprint,
        file_selection.Plan((File("config.jsom", 2, "0" * 64),)).fingerprint,
        file_selection.Plan((File("config.json", 3, "0" * 64),)).fingerprint,
        file_selection.Plan((File("config.json", 2, "1" * 64),)).fingerprint,
    }
    assert len(prints) == 4
    assert file_selection.Plan((file,)).fingerprint == file_selection.Plan((file,), left_out=("a.bin",)).fingerprint
