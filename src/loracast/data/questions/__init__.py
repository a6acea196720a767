"""Make questions about any text: by rule, with a base, or with a model behind an OpenAI-compatible endpoint."""
