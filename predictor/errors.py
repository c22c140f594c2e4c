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
        ├── Unauthorized          401
        ├── Forbidden             403
        ├── NotFound              404
        ├── MethodNotAllowed      405
        ├── BodyTooLarge          413
        ├── GenerationFailed      500
        ├── DeadlineExceeded      504
        └── NotNow                503, says when to come back
            ├── Overloaded        429
            ├── Draining          503
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
    """The request is malformed; the message names the field, and so does `field` where it is a single one."""

    status = 400

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for a single new token."""


class Unauthorized(RequestError):
    """The request brings no key, or one that is not known here."""

    status = 401


class Forbidden(RequestError):
    """The route exists in the protocol, but is closed here."""

    status = 403


class NotFound(RequestError):
    """No such model or route."""

    status = 404


class MethodNotAllowed(RequestError):
    """The route is there, but not for this method."""

    status = 405


class BodyTooLarge(RequestError):
    """The request's body has more bytes than this server reads."""

    status = 413


class GenerationFailed(RequestError):
    """The engine failed on this request."""


class DeadlineExceeded(RequestError):
    """The request's time is over; `partial` is the text of each completion so far, where there is any."""

    status = 504

    def __init__(self, message: str, partial: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.partial = partial


class NotNow(RequestError):
    """The same request may succeed later."""

    status = 503
    retry_after_seconds: ClassVar[int] = 5
    """What the answer suggests; a load or a restart is not over sooner."""


class Overloaded(NotNow):
    """As many sequences run and wait as may."""

    status = 429
    retry_after_seconds = 1


class Draining(NotNow):
    """The server is told to end: it finishes what it has and takes nothing new."""


class ModelNotReady(NotNow):
    """Weights are still loading, or could not be loaded."""


class EngineStopped(NotNow):
    """The step loop has ended: shutting down, or dead."""
