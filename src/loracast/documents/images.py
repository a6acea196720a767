"""Reads an image file with Pillow, the only way in for images. Decompression bombs and damaged files are refused."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from loracast.documents.clean import readable_stem
from loracast.documents.file_types import Limits
from loracast.documents.read import read_bytes
from loracast.errors import DocumentError

if TYPE_CHECKING:
    from PIL.Image import Image

_MAGIC: dict[bytes | tuple[bytes, ...], str] = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    (b"GIF87a", b"GIF89a"): "GIF",
    b"BM": "BMP",
    (b"II*\x00", b"MM\x00*"): "TIFF",
}
MAGIC_BYTES = 16
"""Bytes by which `image_format` knows an image."""
MAX_PIXELS = 50_000_000  # more is a bomb, or nothing that an encoder of 224 x 224 would see


@dataclass(frozen=True, eq=False)
class ImageFile:
    """One image as it has been read."""

    title: str  # the file's name made readable; empty where it has none
    image: Image  # RGB, upright
    file_name: str | None  # without its folders
    media_type: str
    sha256: str  # hash of the file's bytes: the picture's identity
    n_bytes: int


def image_format(data: bytes) -> str | None:
    """The format of an image by its first bytes ("JPEG", "PNG", ...); None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM") and data[6:10] != b"\0\0\0\0":  # two letters alone may begin a text
        return None
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)


def is_image_file(path: str | Path) -> bool:
    """Whether a file is an image, by its content. False where there is no such file: who reads it says so."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait until somebody writes to it
            return False
        with Path(path).open("rb") as file:
            return image_format(file.read(MAGIC_BYTES)) is not None
    except (OSError, ValueError):
        return False


def read_image_file(
    source: str | Path | BinaryIO, *, file_name: str | None = None, limits: Limits | None = None
) -> ImageFile:
    """Reads an image from a path or an open binary stream: JPEG, PNG, WebP, GIF (its first frame), BMP or TIFF.

    Raises DocumentError if it is none of these, larger than MAX_PIXELS, or damaged.
    """
    data, file_name, label = read_bytes(source, file_name, limits or Limits())
    kind = image_format(data)
    if kind is None:
        raise DocumentError(f"{label} is not an image that can be read: give a JPEG, PNG, WebP, GIF, BMP or TIFF file")
    image, sha256 = decode_image(data, kind, label), hashlib.sha256(data).hexdigest()
    return ImageFile(readable_stem(file_name), image, file_name, f"image/{kind.lower()}", sha256, len(data))


def decode_image(data: bytes, kind: str, label: str) -> Image:
    """Bytes of an image of the format `kind` -> the image in RGB, upright, on white where it is transparent."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise DocumentError(
            f"{label} is an image, and reading one needs Pillow: pip install 'loracast[images]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is odd; of bombs we judge ourselves
            image: Image.Image = Image.open(io.BytesIO(data), formats=[kind])
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.draft("RGB", (512, 512))  # JPEG: decode no more than any encoder here sees
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # grey in 16 bits, which converting would cut at 255
                image = image.point(lambda value: value * (1 / 257)).convert("L")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                clear = image.convert("RGBA")
                image = Image.new("RGBA", clear.size, "white")
                image.alpha_composite(clear)
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, MemoryError, OverflowError) as error:
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        reason = "nothing in it is an image" if isinstance(error, UnidentifiedImageError) else reason
        raise DocumentError(f"{label} is a damaged {kind} image ({reason}): get or export it again") from error
    except Image.DecompressionBombError as error:  # Pillow's own, or ours above
        raise DocumentError(
            f"{label} has more than {MAX_PIXELS / 1e6:.0f} million pixels, the most that are read: scale it down"
        ) from error
