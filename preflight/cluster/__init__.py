"""Checks against a live cluster."""
