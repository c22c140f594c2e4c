"""Why a run failed, and whether running it again can help.

    InitializerError                exit 1, worth a retry
    ├── HubUnavailable              the Hub does not give what it promised
    │   └── HubBusy                 network, rate limit, stall, 5xx: asked again a few times within the run
    ├── LeaseTimeout                another initializer holds the snapshot for too long
    ├── LeaseLost                   another initializer took the snapshot over
    ├── NoSpace                     the volume is too full
    ├── VolumeFailed                the volume failed in some other way
    ├── SourceFailed                a directory or archive as a source failed in some other way
    ├── VerificationFailed          what was fetched is not what was promised
    ├── Stopped                     SIGTERM or Ctrl-C
    └── Pointless                   exit 2, pointless to retry
        ├── InvalidUsage            the command line or a setting
        ├── InvalidReference        a source that is not a reference
        ├── NotFound                no such repository, revision, directory or snapshot
        ├── AccessDenied            gated or private, or the token is not accepted; a directory that may not be read
        ├── RefusedSnapshot         files that no predictor should load
        ├── RefusedVolume           a volume that cannot be written, or holds something unknown
        └── DamagedSnapshot         a published snapshot is not what its record says

The text of every error is one sentence that names the culprit and the remedy: KServe shows the last line of the log
as the reason of a failed InferenceService.
"""

from typing import ClassVar


class InitializerError(Exception):
    """A failure with a cause that can be told in one sentence."""

    exit_code: ClassVar[int] = 1
    """What the program exits with: 1 is worth a retry, 2 is not."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class HubUnavailable(InitializerError):
    """The Hub did not give what was asked for."""


class HubBusy(HubUnavailable):
    """The Hub did not answer, or answered that it cannot now; asking again soon may help.

    `retry_after_seconds` is the wait that it asked for, if it did.
    """

    def __init__(self, reason: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class LeaseTimeout(InitializerError):
    """Another initializer was still publishing the same snapshot when patience ended."""


class LeaseLost(InitializerError):
    """Another initializer took this one for dead and goes on in its place."""


class NoSpace(InitializerError):
    """The volume has fewer free bytes than the plan needs."""


class VolumeFailed(InitializerError):
    """The volume failed in a way that may pass."""


class SourceFailed(InitializerError):
    """The directory or archive that is the source failed in a way that may pass."""


class VerificationFailed(InitializerError):
    """Fetched files differ from the plan in size or checksum."""


class Stopped(InitializerError):
    """Somebody asked the program to stop."""


class Pointless(InitializerError):
    """A failure that the same command will meet again."""

    exit_code: ClassVar[int] = 2


class InvalidUsage(Pointless):
    """The command line or a setting is wrong."""


class InvalidReference(Pointless):
    """The source does not follow the grammar of references."""


class NotFound(Pointless):
    """The reference is well-formed and leads nowhere."""


class AccessDenied(Pointless):
    """The source exists, and this token (or no token), or this user, may not read it."""


class RefusedSnapshot(Pointless):
    """The repository or directory holds what must not, or cannot, be served."""


class RefusedVolume(Pointless):
    """The destination cannot be written, or holds a directory that this program did not write."""


class DamagedSnapshot(Pointless):
    """A published snapshot has lost or changed files."""
