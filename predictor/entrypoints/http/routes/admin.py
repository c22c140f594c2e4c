"""KServe's routes that load and unload models: disabled unless the settings enable them."""

from typing import Any

from fastapi import APIRouter

from predictor.entrypoints.kserve_model import Predictor
from predictor.entrypoints.kserve_server import ModelRepository
from predictor.errors import Forbidden

_PATH = "/v2/repository/models/{model_name}"


def create_router(predictor: Predictor) -> APIRouter:
    """Build the routes of KServe's model repository extension."""
    router = APIRouter(include_in_schema=False)
    repository = ModelRepository(predictor)

    @router.post(f"{_PATH}/load")
    async def load(model_name: str) -> dict[str, Any]:
        await repository.load(model_name)
        return {"name": model_name, "load": True}

    @router.post(f"{_PATH}/unload")
    async def unload(model_name: str) -> dict[str, Any]:
        await repository.unload(model_name)
        return {"name": model_name, "unload": True}

    return router


def create_disabled_router() -> APIRouter:
    """Build the same routes, which reject every request."""
    router = APIRouter(include_in_schema=False)

    @router.post(f"{_PATH}/{{action}}")
    async def reject(action: str) -> None:
        raise Forbidden(f"Model {action} is disabled. Start the server with --enable_admin_routes.")

    return router
