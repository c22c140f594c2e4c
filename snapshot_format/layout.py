"""Paths on a volume.

A predictor that waits for a snapshot also reads the directories that begin with a dot, to report the state of the wait.

    <root>/
        demo--arithmetic/                             one directory per model: the reference's slug
            4f0a…c1/                                  one directory per snapshot: the commit
                config.json  model.safetensors  …     as on the Hub
                .snapshot.json                        the record, see `record.py`
            4f0a…c1-int8-cpu/                         a derived variant with its own record
            refs/
                main                                  the commit and a line feed
                refs%2Fpr%2F4                         a revision is percent-encoded, see `reference.py`
        .staging/demo--arithmetic@4f0a…c1.9d3e…/      a snapshot that is being fetched; the suffix is the lease's token
        .locks/demo--arithmetic@4f0a…c1.lease         see `lease.py`
        .status/demo--arithmetic/main                 the last error of a publication, see `failure.py`
"""

from dataclasses import dataclass
from pathlib import Path

from snapshot_format.reference import ModelReference, escape

REFS = "refs"
STATUS = ".status"
STAGING = ".staging"
LOCKS = ".locks"
LEASE_SUFFIX = ".lease"


@dataclass(frozen=True, slots=True)
class SnapshotLocation:
    """Location of one snapshot on a volume."""

    root: Path
    slug: str
    commit: str
    variant: str = ""
    """The derived variant, such as `int8-cpu`; empty for the original snapshot."""

    @property
    def name(self) -> str:
        """The directory name."""
        return f"{self.commit}-{self.variant}" if self.variant else self.commit

    @property
    def directory(self) -> Path:
        """The published snapshot."""
        return self.root / self.slug / self.name

    @property
    def key(self) -> str:
        """The snapshot's name in staging. Slugs never contain `@`."""
        return f"{self.slug}@{self.name}"


def ref_path(root: Path, slug: str, revision: str) -> Path:
    """Return the file that stores the commit of a revision."""
    return root / slug / REFS / escape(revision)


def status_path(root: Path, reference: ModelReference) -> Path:
    """Return the file with the last error of publishing a reference."""
    return root / STATUS / reference.slug / escape(reference.revision)


def lease_path(location: SnapshotLocation) -> Path:
    """Return the lease file of a snapshot and all its variants."""
    return location.root / LOCKS / f"{location.slug}@{location.commit}{LEASE_SUFFIX}"


def read_ref(root: Path, slug: str, revision: str) -> str:
    """Return the commit that a revision was last resolved to.

    Raises:
        FileNotFoundError: the revision has no ref on this volume.
    """
    return ref_path(root, slug, revision).read_text().strip()
