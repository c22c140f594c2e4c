"""Attention, CPU layers and C code."""
