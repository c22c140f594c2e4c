"""HTTP routes, one module for each protocol; each has `create_router`."""
