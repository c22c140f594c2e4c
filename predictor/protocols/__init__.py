"""Wire formats to and from `predictor.types`; no torch, no HTTP."""
