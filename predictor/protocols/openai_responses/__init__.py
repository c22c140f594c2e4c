"""OpenAI's Responses API without storage: the whole conversation is in each request."""
