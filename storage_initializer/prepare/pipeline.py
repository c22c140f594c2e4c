"""Derivation of a variant from a published snapshot: plan, stage, write, verify, publish.

`quantized_checkpoint` is imported only if there are weights to quantize, because it imports torch.
"""

import importlib.util
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from snapshot_format import model_files
from snapshot_format.layout import lease_path
from snapshot_format.recipe import RECIPE_VERSIONS, Variant
from snapshot_format.record import File, QuantizationRecipe, Record
from storage_initializer.errors import DamagedSnapshot, InvalidUsage, NotFound
from storage_initializer.publish import Outcome, Progress
from storage_initializer.settings import Settings
from storage_initializer.volume import layout, lease, permissions, record, verify
from storage_initializer.volume.lease import Lease

_LIBRARIES = ("torch", "transformers", "safetensors")
_CHUNK_BYTES = 1 << 20

log = logging.getLogger(__name__)


def require(settings: Settings) -> None:
    """Check the libraries that `--prepare` needs, before hours of downloading.

    Raises:
        InvalidUsage: libraries are missing.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if settings.prepare and missing:
        raise InvalidUsage(
            f"--prepare {settings.prepare} needs {', '.join(missing)}, which are not installed. "
            "Use the image that is built with --target prepare, or install kserve-llm[prepare]."
        )


def prepare(source: Outcome, variant: Variant, settings: Settings, progress: Progress) -> Outcome:
    """Publish a variant next to a published snapshot, unless it is there already.

    Raises:
        InitializerError: the snapshot itself stays published.
    """
    preparation = _Preparation(source, variant, settings, progress)
    with permissions.umask(settings.umask), layout.translate_os_errors(source.location.root):
        return preparation.run()


class _Preparation:
    """The derivation of a variant from one published snapshot."""

    def __init__(self, source: Outcome, variant: Variant, settings: Settings, progress: Progress) -> None:
        self._started = time.monotonic()
        self._source = source
        self._variant = variant
        self._settings = settings
        self._progress = progress
        self._location = replace(source.location, variant=variant)

    def run(self) -> Outcome:
        published = self._find()
        fresh = published is None
        if published is None:
            path = lease_path(self._location)
            settings = self._settings
            with lease.hold(path, settings.lock_stale_seconds, settings.lock_timeout_seconds) as held:
                # The previous holder of the lease may have prepared it, or removed its source.
                published = self._find()
                fresh = published is None
                if published is None:
                    self._require_source()
                    published = self._publish(held)
        return Outcome(self._source.reference, self._location, published, fresh)

    def _find(self) -> Record | None:
        """Return the record of the published variant, if it has the current recipe."""
        published = layout.find(self._location)
        return published if published and published.recipe and self._is_current(published.recipe) else None

    def _is_current(self, recipe: QuantizationRecipe) -> bool:
        current = (self._variant, RECIPE_VERSIONS[self._variant], sorted(self._settings.prepare_skip_modules))
        return (recipe.name, recipe.version, sorted(recipe.skip_modules)) == current

    def _require_source(self) -> None:
        if layout.find(self._source.location) is None:
            raise NotFound(f"{self._source.location.directory} was removed in the meantime. Run again to publish it.")

    def _publish(self, held: Lease) -> Record:
        """Stage, write, verify and publish, under the lease of the snapshot."""
        source, settings = self._source, self._settings
        from storage_initializer.prepare import quantized_checkpoint

        log.info("preparing %s as %s", source.location.directory, self._variant)
        checkpoint = quantized_checkpoint.plan(
            self._variant, source.location.directory, str(source.reference), settings.prepare_skip_modules
        )
        copied = [file for file in source.record.files if _is_copied(file)]
        written = [file.path for file in checkpoint.files]
        total_bytes = sum(file.size_bytes for file in copied) + sum(file.size_bytes for file in checkpoint.files)
        layout.require_space(self._location, total_bytes)
        staging = layout.stage(self._location, held.token, resume=False)

        def advance(size_bytes: int) -> None:
            held.check()
            self._progress.advance(size_bytes)

        self._progress.begin(total_bytes)
        try:
            # Group-writable, so that other users of the group can remove the files if this program dies.
            with permissions.umask(settings.umask & ~0o070):
                for file in copied:
                    layout.write(staging, file.path, _chunks(source.location.directory / file.path), advance)
                for output in checkpoint.files:
                    layout.write(staging, output.path, output.chunks(), advance)
            layout.remove_bookkeeping(staging)
            files = self._verified(staging, copied, written)
        except BaseException:
            # Another run has no checksums for these files, so it cannot resume.
            layout.remove_path(staging)
            raise
        finally:
            self._progress.end()
        seconds = time.monotonic() - self._started
        version, skip_modules = RECIPE_VERSIONS[self._variant], tuple(sorted(settings.prepare_skip_modules))
        recipe = QuantizationRecipe(self._variant, version, checkpoint.dtype, skip_modules)
        published = record.make(
            source.record.reference, self._location.commit, files, source.record.selection, seconds, recipe=recipe
        )
        held.check()
        if layout.find(self._location) is not None:
            log.info("replacing a variant of another recipe: %s", self._location.directory)
            layout.remove(self._location, f"{held.token}.old")
        layout.publish(self._location, staging, published)
        return published

    def _verified(self, staging: Path, copied: list[File], written: list[str]) -> tuple[File, ...]:
        """Compare the copies with the source's record and measure the written files."""
        result = verify.check(staging, copied)
        issues = [issue for issue in result.issues if issue.path not in written]
        if issues:
            raise DamagedSnapshot(
                f"{self._source.location.directory} is damaged: {'; '.join(map(str, issues))}. "
                f"Remove it and publish {self._source.reference} again."
            )
        measured = (verify.measure(staging, path) for path in written)
        return tuple(sorted(itertools.chain(result.files, measured), key=lambda file: file.path))


def _is_copied(file: File) -> bool:
    """Return whether a file is copied unchanged."""
    return file.path != model_files.CONFIG and not model_files.is_weights(file.path)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            yield chunk
