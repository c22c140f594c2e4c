"""CPU layers and C code."""
