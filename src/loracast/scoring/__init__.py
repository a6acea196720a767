"""Questions with answers packed into batches, and the log-likelihood of the answers under a LoRA."""
