"""The base model: where it comes from, which one it is, its chat format, and greedy or sampled generation."""
