"""The models that loracast knows by name, what each takes, and which of them are in this machine's caches."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from loracast.base.embedded import DEFAULT_BASE, embedded, embedded_folder
from loracast.base.footprint import footprint
from loracast.cast.load import DOC_FILE, OWN_FILES, SHIPPED, TEXT_FILES
from loracast.files import cache_dir
from loracast.hypernets.published import PublishedDocToLoRA, PublishedDocToLoRAConfig, PublishedTextToLoRA
from loracast.hypernets.store import Modality
from loracast.hypernets.text_to_lora import TextToLoRA, TextToLoRAConfig
from loracast.lora.target import target_from_config

WINDOW = 2048
"""Tokens for which the memory of a base is stated."""
_EMBEDDED_AS = {DEFAULT_BASE: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_D_TEXT = 1024
"""Width of gte-large's embeddings, which published Text-to-LoRAs read."""


@dataclass(frozen=True)
class KnownBase:
    """A base that is embedded, or that a published hypernetwork belongs to."""

    name: str
    source: str
    """"embedded" (fetched from a package) or "hub"."""
    n_parameters: int
    memory: dict[str, int]
    """By type of weights, bytes at the peak of answering with a window of WINDOW tokens."""
    disk: int
    """Bytes of its weights in bfloat16."""
    cached: int
    """Bytes of it in the cache; 0 if it is not there."""


@dataclass(frozen=True)
class KnownHypernetwork:
    """A hypernetwork that ships or that was published."""

    name: str
    source: str
    """"shipped" or "published"."""
    modality: Modality
    base: str
    n_parameters: tuple[int, int]
    """The fewest and the most, where it is not known which variant a checkpoint is."""
    disk: tuple[int, int]
    """Bytes in loracast's form: as it ships, or converted to float32. That of a published file is not known here."""
    cached: int
    """Bytes of the published file in the hub's cache, or of what ships; 0 if it is not there."""
    converted: bool
    """Whether its converted form is in the cache."""

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes in memory, where weights are in float32."""
        fewest, most = self.n_parameters
        return 4 * fewest, 4 * most


class Caches:
    """What the hub's cache and the cache of converted hypernetworks hold."""

    @cached_property
    def _hub(self) -> list[tuple[str, str, int, str]]:
        """Repository, path, bytes and hash of each file in the hub's cache."""
        from huggingface_hub import constants, scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
        except CacheNotFound:
            return []
        found = {
            (
                one.repo_id,
                str(file.file_path.relative_to(revision.snapshot_path)),
                file.size_on_disk,
                file.blob_path.name,
            )
            for one in repositories
            for revision in one.revisions
            for file in revision.files
        }
        return sorted(found)

    @cached_property
    def _converted(self) -> set[str]:
        """Hashes of the files whose converted form is there."""
        stored = (json.loads(path.read_text(encoding="utf-8")) for path in cache_dir("converted").glob("*/config.json"))
        return {one["provenance"]["converted_from"]["sha256"] for one in stored}

    def base(self, repository: str) -> int:
        """Bytes of a base's weights in the hub's cache."""
        return sum(n for name, path, n, _ in self._hub if name == repository and path.endswith(".safetensors"))

    def published(self, place: str) -> tuple[int, bool]:
        """Bytes of a checkpoint in the hub's cache, and whether its converted form is there."""
        owner, name, inside = place.split("/", 2)
        wanted = {f"{inside}/{file}" for file in (DOC_FILE, TEXT_FILES[0])}
        # The hub's cache names a large file by its sha256.
        found = [(n, digest) for one, path, n, digest in self._hub if one == f"{owner}/{name}" and path in wanted]
        return sum(n for n, _ in found), any(digest in self._converted for _, digest in found)


def _content() -> dict[str, Any]:
    return tomllib.loads((files("loracast") / "cast" / "catalogue.toml").read_text(encoding="utf-8"))


def base_config(name: str) -> Any:
    """The config of a known base, in transformers' form."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_content()["bases"][name])


def known_bases() -> list[KnownBase]:
    """The embedded bases, then those of published hypernetworks."""
    caches = Caches()
    made = []
    for name in (*embedded("base"), *(name for name in _content()["bases"] if name not in _EMBEDDED_AS.values())):
        is_embedded = name in _EMBEDDED_AS
        config = base_config(_EMBEDDED_AS.get(name, name))
        sizes = {dtype: footprint(config, dtype) for dtype in ("bfloat16", "float32")}
        there = embedded_folder(name) if is_embedded else None
        made.append(
            KnownBase(
                name,
                "embedded" if is_embedded else "hub",
                sizes["bfloat16"].n_parameters,
                {dtype: size.generating(WINDOW) for dtype, size in sizes.items()},
                sizes["bfloat16"].weights,
                caches.base(name) if there is None else _size(there),
            )
        )
    return made


def known_hypernetworks() -> list[KnownHypernetwork]:
    """Those that ship, then the published ones."""
    made = []
    for modality, name in SHIPPED.items():
        folder = Path(str(files("loracast") / "pretrained" / name))
        n, size = _numbers_in(folder / OWN_FILES[1]), _size(folder)
        made.append(
            KnownHypernetwork(name, "shipped", modality, DEFAULT_BASE, (n, n), (size, size), size, converted=False)
        )
    caches = Caches()
    for place, base, modality, counts in _published():
        sizes = min(counts), max(counts)
        cached, converted = caches.published(place)
        disk = 4 * sizes[0], 4 * sizes[1]
        made.append(KnownHypernetwork(place, "published", modality, base, sizes, disk, cached, converted))
    return made


def _published() -> Iterator[tuple[str, str, Modality, list[int]]]:
    """Place, base, modality and the possible numbers of parameters of each published hypernetwork."""
    content = _content()
    for one in content["doc_to_lora"]:
        config = base_config(one["base"])
        with torch.device("meta"):
            hypernet = PublishedDocToLoRA(published_doc_config(config, one["encoder_blocks"]))
        yield one["place"], one["base"], "document", [_count(hypernet)]
    for one in content["text_to_lora"]:
        rows = target_from_config(base_config(one["base"]), ("q_proj", "v_proj")).rows
        with torch.device("meta"):
            variants: list[TextToLoRA] = [TextToLoRA(TextToLoRAConfig(_D_TEXT, rows, variant=v)) for v in ("L", "M")]
            variants.append(PublishedTextToLoRA(TextToLoRAConfig(_D_TEXT, rows, variant="S")))
        yield one["place"], one["base"], "task", [_count(variant) for variant in variants]


def published_doc_config(config: Any, n_encoder_blocks: int) -> PublishedDocToLoRAConfig:
    """The config of a published Doc-to-LoRA for a base (arXiv 2602.15902, appendix on the architecture)."""
    return PublishedDocToLoRAConfig.for_target(
        target_from_config(config), config.hidden_size, reader_layers=tuple(range(config.num_hidden_layers)),
        rank=8, width=512, n_heads=16, n_kv_heads=4, head_dim=128, n_encoder_blocks=n_encoder_blocks, n_latents=8,
        n_decoder_blocks=1, n_latent_mlps=1, static_rank=8,
    )  # fmt: skip


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _numbers_in(file: Path) -> int:
    """How many numbers a hypernetwork's file holds, the scales of int8 left out, from its header."""
    from math import prod

    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return sum(prod(stored.get_slice(name).get_shape()) for name in stored.keys() if "int8_scale" not in name)  # noqa: SIM118


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
