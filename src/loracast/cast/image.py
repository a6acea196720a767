"""Another sense becomes LoRAs, and an image an adapter. It takes the hypernetwork and its encoder; the base is needed only to ask."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loracast.base.fingerprint import Fingerprint
from loracast.documents.images import ImageFile
from loracast.encoders.features import OF_THE_BASE, Encoder, Features
from loracast.encoders.image import load_image_encoder
from loracast.errors import AdapterError, EncoderError, HypernetworkError
from loracast.hypernets.doc_to_lora import DocToLoRA, DocToLoRAConfig
from loracast.hypernets.store import from_pretrained, weights_hash
from loracast.library.adapter import Adapter
from loracast.library.save import save_lora
from loracast.lora.algebra import LoRA, LoRABatch

if TYPE_CHECKING:
    from PIL.Image import Image


def check_encoder(config: DocToLoRAConfig, encoder: Encoder) -> None:
    """Raises HypernetworkError where a hypernetwork was trained with another encoder."""
    if config.encoder == OF_THE_BASE:
        raise HypernetworkError("this hypernetwork reads documents with the base, and no images or signals")
    if (config.encoder_fingerprint, config.d_features) != (encoder.fingerprint, encoder.d_features):
        raise HypernetworkError(
            f"the hypernetwork was trained with the encoder {config.encoder!r} (fingerprint {config.encoder_fingerprint}), and "
            f"{encoder.name!r} has the fingerprint {encoder.fingerprint}: give the encoder that it was trained with"
        )


class FeatureCaster:
    """Casts what an encoder sees into LoRAs for the base that its hypernetwork was made for."""

    def __init__(self, hypernet: DocToLoRA, made_for: Fingerprint, encoder: Encoder):
        check_encoder(hypernet.config, encoder)
        self.hypernet, self.made_for, self.encoder = hypernet.eval(), made_for, encoder
        self.hypernet_hash = weights_hash(hypernet)
        self._device = next(hypernet.parameters()).device

    def loras(self, inputs: Any) -> LoRABatch:
        """n things, as the encoder takes them -> their n LoRAs, in one pass."""
        return self.loras_of(self.encoder(inputs))

    @torch.inference_mode()
    def loras_of(self, features: Features) -> LoRABatch:
        """The same from their features."""
        with torch.autocast(self._device.type, torch.bfloat16) if self._device.type == "cuda" else nullcontext():
            return self.hypernet(features.to(self._device)).loras


class ImageCaster:
    """Casts images into adapters."""

    def __init__(self, caster: FeatureCaster, library: Path):
        self.caster, self.library = caster, library

    def lora(self, image: Image) -> LoRA:
        """The LoRA of one image in RGB."""
        return self.caster.loras([image]).row(0)

    def learn(self, picture: ImageFile, name: str, *, replace: bool = False) -> Adapter:
        """Cast a picture into an adapter and keep it.

        Raises:
            AdapterError: the name is taken or not allowed, or the hypernetwork gave numbers that are not finite; nothing is kept then.
        """
        started = time.perf_counter()
        lora = self.lora(picture.image)
        if not all(side.isfinite().all() for pair in lora.factors.values() for side in pair):
            raise AdapterError("the hypernetwork gave numbers that are not finite for this image; nothing is kept")
        return save_lora(
            lora,
            self.library,
            name,
            kind="image",
            title=picture.title,
            source=picture.file_name,
            source_sha256=picture.sha256,
            made_for=self.caster.made_for,
            hypernetwork=self.caster.hypernet_hash,
            seconds=time.perf_counter() - started,
            replace=replace,
        )


def load_image_caster(
    hypernetwork: str | Path,
    library: Path,
    *,
    encoder: str | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ImageCaster:
    """Load a hypernetwork for images with its image encoder.

    Args:
        hypernetwork: a folder or hub repository.
        encoder: where the image encoder lies now, if not where it lay in training.
        say: told what is being done where the encoder has to be fetched first.
    """
    hypernet, made_for = from_pretrained(hypernetwork, DocToLoRA)
    if hypernet.config.encoder == OF_THE_BASE:
        raise HypernetworkError(
            f"{hypernetwork} reads documents, and no images: give one that `loracast train image` made"
        )
    try:
        loaded = load_image_encoder(encoder or hypernet.config.encoder, device, say)
    except EncoderError as error:
        raise EncoderError(
            f"the hypernetwork {Path(hypernetwork).name!r} sees with an image encoder: {error}"
        ) from error
    return ImageCaster(FeatureCaster(hypernet.to(loaded.device), made_for, loaded), library)
