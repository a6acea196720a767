"""The base model: loading it, its fingerprint, its chat format, and greedy or sampled generation."""
