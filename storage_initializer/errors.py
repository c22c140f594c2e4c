"""Reasons why a run failed, and whether another run may succeed.

    InitializerError                exit 1, worth a retry
    ├── HubUnavailable              the Hub returned something unexpected
    │   └── TransientHubError       network, rate limit, stall, 5xx: retried a few times within the run
    ├── LeaseTimeout                another initializer held the lease for too long
    ├── LeaseLost                   another initializer took the lease over
    ├── NoSpace                     the volume is full
    ├── VolumeNotWritable           this user may not write to the volume; its permissions may still change
    ├── VolumeFailed                any other error of the volume
    ├── SourceFailed                any other error of a source directory or archive
    ├── VerificationFailed          fetched files do not match their checksums
    ├── Stopped                     SIGTERM or Ctrl-C
    └── PermanentError              exit 2, pointless to retry
        ├── InvalidUsage            command line or settings
        ├── InvalidReference        malformed source
        ├── NotFound                no such repository, revision, directory or snapshot
        ├── AccessDenied            gated or private repository, rejected token, unreadable directory
        ├── RefusedSnapshot         files that no predictor should load
        ├── RefusedVolume           a volume that is mounted read-only or contains unknown files
        └── DamagedSnapshot         a published snapshot differs from its record

Every message is one line with the cause and the fix: KServe shows the last line of the log as the reason of a failed
InferenceService.
"""

from typing import ClassVar


class InitializerError(Exception):
    """A failure that one line explains."""

    exit_code: ClassVar[int] = 1
    """The program's exit code: 1 is worth a retry, 2 is not."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


def explain(error: Exception) -> InitializerError:
    """Return the error with its explanation; one that no code expects is described by its type."""
    if isinstance(error, InitializerError):
        return error
    return InitializerError(
        f"Unexpected {type(error).__name__} ({error}). Run again with LOG_LEVEL=DEBUG and report it."
    )


class HubUnavailable(InitializerError):
    """The Hub did not return the requested data."""


class TransientHubError(HubUnavailable):
    """The Hub did not respond or is overloaded; a retry may succeed soon.

    `retry_after_seconds` is the wait that the Hub requested, if any.
    """

    def __init__(self, reason: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class LeaseTimeout(InitializerError):
    """Another initializer still held the lease when the timeout expired."""


class LeaseLost(InitializerError):
    """Another initializer considered this one dead and took its lease over."""


class NoSpace(InitializerError):
    """The volume has too few free bytes."""


class VolumeNotWritable(InitializerError):
    """This user may not write to the volume.

    Worth a retry: the kubelet applies `fsGroup` when the volume is mounted again, and an administrator may change the
    owner of its directory.
    """


class VolumeFailed(InitializerError):
    """The volume failed in a way that may be temporary."""


class SourceFailed(InitializerError):
    """The source directory or archive failed in a way that may be temporary."""


class VerificationFailed(InitializerError):
    """Fetched files differ from the listing in size or checksum."""


class Stopped(InitializerError):
    """A signal stopped the program."""


class PermanentError(InitializerError):
    """A failure that the same command will meet again."""

    exit_code: ClassVar[int] = 2


class InvalidUsage(PermanentError):
    """The command line or a setting is invalid."""


class InvalidReference(PermanentError):
    """The source is not a model reference."""


class NotFound(PermanentError):
    """The reference is well-formed, but its target does not exist."""


class AccessDenied(PermanentError):
    """The source exists, but this token or user may not read it."""


class RefusedSnapshot(PermanentError):
    """The repository or directory contains files that must not, or cannot, be served."""


class RefusedVolume(PermanentError):
    """The destination is mounted read-only, or contains a directory that this program did not write."""


class DamagedSnapshot(PermanentError):
    """A published snapshot has missing or changed files."""
