"""Adapters in the formats of other runtimes. The names of the formats stand here, where they cost no import."""

MERGED = "merged"
"""The one format that needs the base's weights: it writes them, with the LoRA added (base.py)."""
FORMATS = {
    "peft": "PEFT, SGLang",
    "vllm": "vLLM",
    "gguf": "llama.cpp",
    "mlx": "mlx-lm",
    "ollama": "Ollama",
    MERGED: "into the base's weights",
}
"""Name of each format -> what it is for; `WRITERS` (adapter.py) has how each is written."""
