"""A snapshot directory becomes a model on a device."""
