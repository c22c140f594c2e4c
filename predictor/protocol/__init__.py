"""Wire formats: each module turns one protocol's bytes into generation requests, and completions back. No torch."""
