"""The volume: layout, lease, record, verification and garbage collection."""
