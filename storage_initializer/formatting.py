"""Formatting of sizes for people."""


def format_bytes(size_bytes: float) -> str:
    """Return a size with its largest binary unit, such as `3.6 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
