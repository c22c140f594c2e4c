"""A replica of Ray Serve whose model takes orders; see `servers.Orders`."""

import sys
from pathlib import Path

from predictor.entrypoints.ray_serve import Replica
from predictor.entrypoints.ray_settings import RaySettings


class HeldReplica(Replica):
    """Reads the orders in a file.

    Args:
        parsed: as for `Replica`.
        order: the file.
    """

    async def __init__(self, parsed: RaySettings, order: Path) -> None:  # type: ignore[misc] # Serve awaits it
        # KServe parses sys.argv when it is imported.
        del sys.argv[1:]
        from tests.predictor import held_model

        held_model.install(order)
        await super().__init__(parsed)
