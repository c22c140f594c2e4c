"""Everything that can go wrong in the predictor, as one tree.

    PredictorError
    ├── StartupError              the process cannot serve: exit code 1
    │   ├── InvalidSettings       a flag or variable is wrong: exit code 2
    │   ├── SnapshotMissing       no complete snapshot where one was expected
    │   ├── UnsupportedModel      a snapshot that this predictor cannot serve
    │   └── PortInUse
    └── RequestError              one request cannot be answered; carries the HTTP status
        ├── InvalidRequest        400
        │   └── PromptTooLong     400
        ├── Forbidden             403
        ├── NotFound              404
        ├── GenerationFailed      500
        └── Unavailable           503
            ├── ModelNotReady     503
            └── EngineStopped     503

Each message is one sentence that names the culprit and the remedy; it is shown to users as it is.
"""

from typing import ClassVar


class PredictorError(Exception):
    """The root: anything that the predictor raises on purpose."""


class StartupError(PredictorError):
    """The process cannot serve and ends."""

    exit_code: ClassVar[int] = 1


class InvalidSettings(StartupError):
    """A flag or an environment variable is unknown, malformed or out of range."""

    exit_code = 2


class SnapshotMissing(StartupError):
    """There is no complete snapshot at the place named."""


class UnsupportedModel(StartupError):
    """The snapshot is there, but its architecture, format or size cannot be served."""


class PortInUse(StartupError):
    """Another process listens on the port."""


class RequestError(PredictorError):
    """One request cannot be answered; the others go on."""

    status: ClassVar[int] = 500
    """HTTP status code."""


class InvalidRequest(RequestError):
    """The request is malformed; the message names the field."""

    status = 400


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for a single new token."""


class Forbidden(RequestError):
    """The route exists in the protocol, but is closed here."""

    status = 403


class NotFound(RequestError):
    """No such model or route."""

    status = 404


class GenerationFailed(RequestError):
    """The engine failed on this request."""


class Unavailable(RequestError):
    """Not now; the same request may succeed later."""

    status = 503


class ModelNotReady(Unavailable):
    """Weights are still loading, or could not be loaded."""


class EngineStopped(Unavailable):
    """The step loop has ended: shutting down, or dead."""
