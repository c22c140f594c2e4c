"""Puts exactly one snapshot of a model into one directory of a volume: verified, atomic, once.

Knows nothing about serving. It shares the directory format of `volume.py` with the predictor, and nothing else.
"""
