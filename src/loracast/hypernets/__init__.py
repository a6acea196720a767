"""Hypernetworks: networks that map the features of a condition to the factors of a LoRA."""
