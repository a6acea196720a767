"""Ray Serve LLM finds and fetches exported adapters: its own code, without a cluster and without vLLM."""

from __future__ import annotations

import asyncio
import types

import fsspec
import pytest
import torch

from adapters import write
from loracast.export.adapter import export_adapter
from loracast.lora.algebra import LoRA
from loracast.lora.peft_format import read_peft


def test_a_folder_of_exported_adapters_is_what_it_lists_and_fetches(s3, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="pip install 'ray[serve]'")
    from ray.llm._internal.common.utils.lora_utils import get_lora_model_ids
    from ray.llm._internal.serve.core.configs.llm_config import LoraConfig
    from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader

    url, adapters = f"{s3}/served", [write(tmp_path / "library", name=f"doc-{i}", seed=i) for i in range(3)]
    for adapter in adapters:
        export_adapter(adapter, "vllm", tmp_path / "served" / adapter.version)
    fsspec.filesystem("s3").put(f"{tmp_path}/served/", url, recursive=True)

    assert sorted(get_lora_model_ids(url, "base")) == [f"base:{adapter.version}" for adapter in adapters]
    config = types.SimpleNamespace(lora_config=LoraConfig(dynamic_lora_loading_path=url))
    loader = LoraModelLoader(str(tmp_path / "cache"))
    for adapter in adapters:
        found = asyncio.run(loader.load_model_from_config(f"base:{adapter.version}", config))
        lora, whole = LoRA(read_peft(tmp_path / "cache" / adapter.version)), adapter.lora()
        assert found.local_path == str(tmp_path / "cache" / adapter.version)
        for module in whole.names:
            torch.testing.assert_close(lora.delta(module).float(), whole.delta(module).float())
