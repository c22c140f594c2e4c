"""Prompts, detokenization, output streams: text around the engine."""
