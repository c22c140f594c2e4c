"""What is made of a published snapshot ahead of serving, and lies beside it: plan, stage, write, verify, publish.

Owns the order of the steps and the recipe's number; how weights are rounded is for `rounding.py` to know, which is
imported when there is something to round: it takes torch, and seconds.
"""

import importlib.util
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from storage_initializer.errors import DamagedSnapshot, InvalidUsage, NotFound
from storage_initializer.publish import Outcome, Progress
from storage_initializer.settings import Settings
from storage_initializer.sources import file_selection
from storage_initializer.sources.file_selection import File
from storage_initializer.volume import layout, lease, record, verify
from storage_initializer.volume.lease import Lease
from storage_initializer.volume.record import Recipe, Record

VERSION = 1
"""Of the recipe `int8-cpu`: to be counted up when `rounding.py` makes other weights of the same ones.

The predictor takes what was made by the version that it knows, and rounds by itself otherwise.
"""

_LIBRARIES = ("torch", "transformers", "safetensors")
_CHUNK_BYTES = 1 << 20

log = logging.getLogger(__name__)


def require(settings: Settings) -> None:
    """Check that this program can do what `--prepare` asks for, before hours of fetching.

    Raises:
        InvalidUsage: libraries are missing.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if settings.prepare and missing:
        raise InvalidUsage(
            f"--prepare {settings.prepare} needs {', '.join(missing)}, which this image lacks: "
            "use the one that is built with --target prepare, or install kserve-llm[prepare]"
        )


def prepare(outcome: Outcome, settings: Settings, progress: Progress) -> Outcome:
    """Make sure that what `--prepare` asks for lies beside a published snapshot.

    Raises:
        InitializerError: one sentence says why not; the snapshot itself is published all the same.
    """
    work = _Work(outcome, settings, progress)
    with layout.created_with(settings.umask), layout.explained(outcome.place.root):
        return work.outcome()


class _Work:
    """One published snapshot, and what becomes of it."""

    def __init__(self, source: Outcome, settings: Settings, progress: Progress) -> None:
        self._started = time.monotonic()
        self._source = source
        self._settings = settings
        self._progress = progress
        self._place = replace(source.place, form=settings.prepare or "")

    def outcome(self) -> Outcome:
        published = self._find()
        fresh = published is None
        if published is None:
            path = layout.lease_path(self._place)
            settings = self._settings
            with lease.hold(path, settings.lock_stale_seconds, settings.lock_timeout_seconds) as held:
                # Whoever held the lease before may have prepared it, or removed what it is to be made of.
                published = self._find()
                fresh = published is None
                if published is None:
                    self._require_source()
                    published = self._publish(held)
        return Outcome(self._source.reference, self._place, published, fresh)

    def _find(self) -> Record | None:
        """What was prepared, if it is by this recipe."""
        found = layout.find(self._place)
        return found if found and found.recipe and self._agrees(found.recipe) else None

    def _agrees(self, recipe: Recipe) -> bool:
        wanted = (self._settings.prepare, VERSION, sorted(self._settings.prepare_keep))
        return (recipe.name, recipe.version, sorted(recipe.keep)) == wanted

    def _require_source(self) -> None:
        if layout.find(self._source.place) is None:
            raise NotFound(f"{self._source.place.directory} was removed meanwhile: run again to publish it anew")

    def _publish(self, held: Lease) -> Record:
        """Stage, write, verify and publish, under the lease of the snapshot."""
        source, settings = self._source, self._settings
        from storage_initializer.prepare import int8_weights

        log.info("preparing %s as %s", source.place.directory, settings.prepare)
        rounded = int8_weights.plan(source.place.directory, str(source.reference), settings.prepare_keep)
        copied = [file for file in source.record.files if _stays(file)]
        total_bytes = sum(file.size_bytes for file in copied) + sum(draft.size_bytes for draft in rounded.drafts)
        layout.require_space(self._place, total_bytes)
        staging = layout.stage(self._place, held.token, afresh=True)

        def advance(size_bytes: int) -> None:
            held.check()
            self._progress.advance(size_bytes)

        self._progress.begin(total_bytes)
        try:
            # Others of the group can remove what is left, should this program die.
            with layout.created_with(settings.umask & ~0o070):
                for file in copied:
                    layout.write(staging, file.path, _chunks(source.place.directory / file.path), advance)
                for draft in rounded.drafts:
                    layout.write(staging, draft.path, draft.chunks(), advance)
            layout.tidy(staging)
            files = self._verified(staging, copied, [draft.path for draft in rounded.drafts])
        except BaseException:
            # None of it is of use to another run, which would have to trust it.
            layout.clear(staging)
            raise
        finally:
            self._progress.end()
        seconds = time.monotonic() - self._started
        recipe = Recipe(self._place.form, VERSION, rounded.dtype, tuple(sorted(settings.prepare_keep)))
        made = record.make(
            source.record.reference, self._place.commit, files, source.record.choice, seconds, recipe=recipe
        )
        held.check()
        if layout.find(self._place) is not None:
            log.info("replacing what another recipe has made: %s", self._place.directory)
            layout.remove(self._place, f"{held.token}.old")
        layout.publish(self._place, staging, made)
        return made

    def _verified(self, staging: Path, copied: list[File], drafts: list[str]) -> tuple[File, ...]:
        """All files that were written: copies as the record has them, and the others as they are."""
        findings = verify.check(staging, copied)
        issues = [issue for issue in findings.issues if issue.path not in drafts]
        if issues:
            raise DamagedSnapshot(
                f"{self._source.place.directory} is damaged: {'; '.join(map(str, issues))}; "
                f"remove it and publish {self._source.reference} again"
            )
        made = (verify.measure(staging, path) for path in drafts)
        return tuple(sorted(itertools.chain(findings.files, made), key=lambda file: file.path))


def _stays(file: File) -> bool:
    """Whether a file is taken over as it is."""
    return file.path != file_selection.CONFIG and not file_selection.holds_weights(file)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            yield chunk
