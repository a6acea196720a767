"""Hypernetworks: networks that map the features of a condition to the factors of a LoRA.

All architectures are imported here, so that whoever reads a hypernetwork finds its architecture.
"""

from loracast.hypernets import attention_delta, doc_to_lora, published, text_to_lora

__all__ = ["attention_delta", "doc_to_lora", "published", "text_to_lora"]
