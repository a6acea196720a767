"""Self-made questions about any text: by rule, by a base, or by a model behind an OpenAI-compatible endpoint."""
