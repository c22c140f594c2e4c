"""Publishes exactly one snapshot of a model in one directory of a volume: verified, atomic, once.

It shares `snapshot_format` with the predictor, and nothing else.
"""
