"""Quantize weights ahead of serving."""
