"""The Hub and the model of the storage initializer's tests."""

from tests.storage_initializer.conftest import hub, model

__all__ = ["hub", "model"]
