"""Limits of this machine or container: CPU time, memory, threads."""
