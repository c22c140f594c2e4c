"""OpenAI's completions, chat completions and models, as plain dicts: importing the `openai` package is too slow."""
