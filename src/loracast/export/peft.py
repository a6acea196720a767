"""Writes a LoRA as a folder in PEFT's format, which `PeftModel.from_pretrained` and SGLang load."""

from __future__ import annotations

from pathlib import Path

from loracast.export.format import Format, Request
from loracast.lora.peft_format import write_peft_folder


def write_peft(request: Request) -> Path:
    """Write a LoRA as PEFT does; returns the folder."""
    return write_peft_folder(request.made.lora.factors, request.out, request.base, request.about)


FORMAT = Format(write_peft)
