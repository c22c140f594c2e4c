"""The demo model that ships with the repository: how it was trained, how good it is, and a guided run of the whole."""
