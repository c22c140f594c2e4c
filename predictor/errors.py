"""Exceptions of the predictor: a `StartupError` ends the process, a `RequestError` fails one request.

Each message names the problem and the fix; it is shown to users unchanged.
"""

from typing import ClassVar


class PredictorError(Exception):
    """Base class of all exceptions that the predictor raises on purpose."""


class StartupError(PredictorError):
    """The process cannot serve and exits."""

    exit_code: int = 1


class InvalidSettings(StartupError):
    """A flag or an environment variable is unknown, malformed or out of range."""

    exit_code = 2


class SnapshotMissing(StartupError):
    """The directory or reference has no complete snapshot."""


class UnsupportedModel(StartupError):
    """The snapshot's architecture, format or size is not supported."""


class PortInUse(StartupError):
    """Another process listens on the port."""


class RankFailed(StartupError):
    """A rank of a tensor-parallel model cannot load its part, ended or hangs."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RankLost(RankFailed):
    """A connection to another rank broke."""


class LoadCancelled(PredictorError):
    """A signal ended the load."""


class RequestError(PredictorError):
    """One request fails; others are not affected."""

    status: ClassVar[int] = 500
    """HTTP status code."""


class InvalidRequest(RequestError):
    """The request is malformed; `field` is the name of the wrong field if there is exactly one."""

    status = 400

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(InvalidRequest):
    """The prompt fills the context, so that not one new token fits."""


class Unauthorized(RequestError):
    """The API key is missing or invalid."""

    status = 401


class Forbidden(RequestError):
    """The route is part of the protocol, but disabled on this server."""

    status = 403


class NotFound(RequestError):
    """The model or route does not exist."""

    status = 404


class MethodNotAllowed(RequestError):
    """The route exists, but not for this method."""

    status = 405


class BodyTooLarge(RequestError):
    """The request body exceeds the size limit."""

    status = 413


class UnsupportedMediaType(RequestError):
    """The request body has a content coding that the server does not decode."""

    status = 415


class GenerationFailed(RequestError):
    """The engine failed on this request."""


class ChatTemplateFailed(GenerationFailed):
    """The model's chat template does not work. No change of the request helps."""


class DeadlineExceeded(RequestError):
    """The request timed out; `partial` is the text of each completion so far, if any."""

    status = 504

    def __init__(self, message: str, partial: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.partial = partial


class NotNow(RequestError):
    """The request failed temporarily; a retry may succeed."""

    status = 503
    retry_after_seconds: int = 5
    """Value of Retry-After; a load or restart takes at least this long."""


class Overloaded(NotNow):
    """Running and waiting queues are full."""

    status = 429
    retry_after_seconds = 1
    limit: str = "queue"
    """Name of the limit, for metrics."""


class RateLimited(Overloaded):
    """The caller has reached a limit of its API key; `limit` is the limit's name in the file of keys."""

    def __init__(self, message: str, limit: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds


class Draining(NotNow):
    """The server is shutting down: it finishes running requests and rejects new ones."""


class ModelNotReady(NotNow):
    """The model is still loading, or failed to load."""

    def __init__(self, message: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(message)
        if retry_after_seconds is not None:
            self.retry_after_seconds = retry_after_seconds


class EngineStopped(NotNow):
    """The step loop has ended, by shutdown or failure."""


class OutOfMemory(GenerationFailed, NotNow):
    """A step did not fit into memory, and this request's sequence was the newest of it."""

    status = NotNow.status
