"""The directory format that the storage initializer writes and the predictor reads.

Standard library only: all three programs import this package, and it imports none of them.
"""
