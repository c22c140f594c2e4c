"""Properties of the reference grammar."""

import posixpath
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from snapshot_format.reference import (
    MAX_ESCAPED_CHARACTERS,
    DirectoryReference,
    HubReference,
    MalformedReference,
    escape,
    parse,
)

NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._]{0,20}[A-Za-z0-9])?", fullmatch=True).filter(lambda n: ".." not in n)
REVISIONS = st.from_regex(r"[A-Za-z0-9_]{1,12}(/[A-Za-z0-9_+-]{1,12}){0,3}", fullmatch=True).filter(
    lambda revision: not any(part.startswith("-") for part in revision.split("/"))
)
COMMITS = st.from_regex(r"[0-9a-f]{40}", fullmatch=True)
DIRECTORIES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=10), min_size=1, max_size=4
)


@given(NAMES, NAMES, st.one_of(REVISIONS, COMMITS), st.sampled_from(":@"))
def test_hub_reference_round_trips(owner: str, model: str, revision: str, separator: str) -> None:
    reference = parse(f"hf://{owner}/{model}{separator}{revision}")
    assert reference == HubReference(owner, model, revision)
    assert parse(str(reference)) == reference
    assert reference.slug == f"{owner}--{model}"


@given(NAMES, NAMES)
def test_hub_reference_without_revision_defaults_to_main(owner: str, model: str) -> None:
    assert parse(f"hf://{owner}/{model}") == HubReference(owner, model, "main")


@given(COMMITS)
def test_commit_in_either_case_is_normalized(commit: str) -> None:
    for text in (commit, commit.upper()):
        reference = parse(f"hf://demo/arithmetic:{text}")
        assert reference.is_commit
        assert reference.revision == commit


@given(st.text(max_size=60))
def test_parse_any_text_gives_safe_names_or_one_error(text: str) -> None:
    errors: list[str] = []
    for candidate in (text, f"hf://{text}", f"hf://demo/arithmetic:{text}", f"file://{text}", f"file:///{text}"):
        try:
            reference = parse(candidate)
        except MalformedReference as error:
            errors.append(str(error))
            continue
        for name in (reference.slug, escape(reference.revision)):
            assert name == PurePosixPath(name).name
            assert not name.startswith(".")
            assert len(name.encode()) < 256
    assert not any("\n" in error for error in errors)


@given(REVISIONS)
def test_escaped_revision_is_reversible(revision: str) -> None:
    assert unquote(escape(revision)) == revision
    assert "/" not in escape(revision)


@given(DIRECTORIES)
def test_directory_reference_keeps_its_path(parts: list[str]) -> None:
    path = Path("/", *parts)
    normal = Path(posixpath.normpath(path))
    assume(normal.name and len(quote(normal.name, safe="")) <= MAX_ESCAPED_CHARACTERS)
    assert parse(f"file://{quote(str(path))}") == DirectoryReference(normal)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not a reference"),
        (f"hf://{'o' * 60}/{'m' * 60}", "exceeds the Hub's limit of 96 characters"),
        (f"hf://o/m:{'r' * 201}", "not a branch, tag or commit"),
        ("file:///a%00b", "not an absolute directory"),
        (f"file:///{'d' * 201}", "no usable directory name"),
        ("hf://o/m\n", "unprintable"),
    ],
    ids=["empty", "long name", "long revision", "null byte", "long directory", "line break"],
)
def test_parse_malformed_reference_names_the_problem(text: str, problem: str) -> None:
    with pytest.raises(MalformedReference, match=problem):
        parse(text)
