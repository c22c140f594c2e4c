"""Checks of rendered objects, one module for each subject."""
