"""Turn a snapshot directory into a model on a device."""
