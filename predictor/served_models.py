"""The models that a server has, by name and version, and the check that a request names one of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from predictor.errors import NotFound

VERSION = "1"
"""The only version of every model, for routes that name one."""


@dataclass(frozen=True, slots=True)
class ServedModels:
    """Names of the served models; the first is the default."""

    names: Sequence[str]

    @property
    def default(self) -> str:
        """Name of the model for requests that name none."""
        return self.names[0]

    def require(self, name: str, version: str | None = None) -> None:
        """Check that a model is served, and in this version unless that is None or empty.

        Raises:
            NotFound: there is no such model or version.
        """
        if name not in self.names:
            raise NotFound(f"Model not found: {name!r}. Use {' or '.join(map(repr, self.names))}.")
        if version not in (None, "", VERSION):
            raise NotFound(f"Version of model {name!r} not found: {version!r}. Use {VERSION!r}.")
