"""Serve a directory of weights: a KServe model on a continuous-batching engine."""
