"""A server of OpenAI's API for a base with its library of adapters: HTTP, engine, page."""
