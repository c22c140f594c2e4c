"""The directory format that the storage initializer writes and the predictor reads."""
