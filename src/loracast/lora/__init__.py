"""LoRA algebra, target modules, injection into a model, merging, quantisation and file formats."""
