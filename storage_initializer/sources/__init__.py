"""Where snapshots come from: the Hub, a directory, an archive."""
