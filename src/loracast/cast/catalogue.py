"""The models that loracast knows by name, what each takes, and which of them are in this machine's caches."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from loracast.base.embedded import DEFAULT_BASE, HUB_IDS, embedded, embedded_folder
from loracast.base.footprint import footprint
from loracast.cast.load import DOC_FILE, OWN_FILES, SHIPPED, TEXT_FILES
from loracast.files import bytes_in, cache_dir
from loracast.hypernets.store import Modality

WINDOW = 2048
"""Tokens for which the memory of a base is stated."""


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


def _hub_folder(repository: str) -> Path | None:
    """The folder of a repository in the hub's cache; None where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def published_in_cache(place: str) -> tuple[int, bool]:
    """Bytes of a published checkpoint in the hub's cache, and whether its converted form is in ours."""
    owner, name, inside = place.split("/", 2)
    folder = _hub_folder(f"{owner}/{name}")
    if folder is None:
        return 0, False
    found = [path for file in (DOC_FILE, TEXT_FILES[0]) if (path := folder / inside / file).is_file()]
    stored = (json.loads(path.read_text(encoding="utf-8")) for path in cache_dir("converted").glob("*/config.json"))
    converted = {one["provenance"]["converted_from"]["sha256"] for one in stored}
    # The hub's cache names a large file by its sha256.
    return sum(path.stat().st_size for path in found), any(path.resolve().name in converted for path in found)


def _content() -> dict[str, Any]:
    return tomllib.loads((files("loracast") / "cast" / "catalogue.toml").read_text(encoding="utf-8"))


def base_config(name: str) -> Any:
    """The config of a known base, in transformers' form."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_content()["bases"][name])


def known_bases() -> list[KnownBase]:
    """The embedded bases, then those of published hypernetworks."""
    made = []
    for name in (*embedded("base"), *(name for name in _content()["bases"] if name not in HUB_IDS.values())):
        is_embedded = name in HUB_IDS
        folder = embedded_folder(name) if is_embedded else _hub_folder(name)
        config = base_config(HUB_IDS.get(name, name))
        sizes = {dtype: footprint(config, dtype) for dtype in ("bfloat16", "float32")}
        made.append(
            KnownBase(
                name,
                "embedded" if is_embedded else "hub",
                sizes["bfloat16"].n_parameters,
                {dtype: size.generating(WINDOW) for dtype, size in sizes.items()},
                sizes["bfloat16"].weights,
                0 if folder is None else bytes_in(folder, "*" if is_embedded else "*.safetensors"),
            )
        )
    return made


def known_hypernetworks() -> list[KnownHypernetwork]:
    """Those that ship, then the published ones."""
    made = []
    for modality, name in SHIPPED.items():
        folder = Path(str(files("loracast") / "pretrained" / name))
        n, size = _numbers_in(folder / OWN_FILES[1]), bytes_in(folder)
        made.append(
            KnownHypernetwork(name, "shipped", modality, DEFAULT_BASE, (n, n), (size, size), size, converted=False)
        )
    for one in _content()["published"]:
        fewest, most = one["parameters"]
        made.append(
            KnownHypernetwork(
                one["place"], "published", one["modality"], one["base"], (fewest, most), (4 * fewest, 4 * most),
                *published_in_cache(one["place"]),
            )
        )  # fmt: skip
    return made


def _numbers_in(file: Path) -> int:
    """How many numbers a hypernetwork's file holds, the scales of int8 left out, from its header."""
    from math import prod

    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return sum(prod(stored.get_slice(name).get_shape()) for name in stored.keys() if "int8_scale" not in name)  # noqa: SIM118
