"""A document, a task description or an image becomes an adapter: read, encode, cast, keep."""
