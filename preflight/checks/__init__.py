"""Checks of rendered objects, one module per subject."""
