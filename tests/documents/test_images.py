"""Images as files: what is read, what is refused, and labelled sets of them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loracast.answering.options import read_source
from loracast.documents import Document, read_document
from loracast.documents.file_types import Limits
from loracast.documents.images import MAX_PIXELS, ImageFile, image_format, is_image_file, read_image_file
from loracast.errors import ConfigError, DocumentError
from loracast.lab.data.labelled import read_images
from tiny import gradient


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_format_is_known_by_its_content_and_read(tmp_path, kind):
    path = tmp_path / "my_red-wall.bin"
    path.write_bytes(encoded(gradient(), kind))
    assert is_image_file(path) and image_format(path.read_bytes()) == kind
    picture = read_image_file(path)
    assert (picture.title, picture.file_name, picture.media_type) == ("my red wall", path.name, f"image/{kind.lower()}")
    assert picture.image.mode == "RGB" and picture.image.size == (24, 16)
    left, right = (np.asarray(picture.image)[:, x, 0].mean() for x in (1, -2))
    assert left < 40 and right > 200
    with path.open("rb") as stream:
        assert read_image_file(stream).sha256 == picture.sha256


def test_an_image_stands_upright_on_white(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(gradient(), "JPEG", exif=turned))
    assert read_image_file(path).image.size == (16, 24)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    shown = read_image_file(io.BytesIO(encoded(clear, "PNG"))).image
    assert shown.getpixel((0, 0)) == (255, 0, 0) and shown.getpixel((3, 3)) == (255, 255, 255)
    grey = read_image_file(io.BytesIO(encoded(Image.new("L", (4, 4), 77), "PNG"))).image
    assert grey.getpixel((1, 1)) == (77, 77, 77)


def test_bombs_and_damage_are_refused(tmp_path):
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 200_000 and MAX_PIXELS < 20_000**2
    with pytest.raises(DocumentError, match="more than 50 million pixels"):
        read_image_file(io.BytesIO(bomb), file_name="bomb.png")
    with pytest.raises(DocumentError, match="more than 50 million pixels"):  # below Pillow's own limit
        read_image_file(io.BytesIO(encoded(Image.new("1", (8_000, 8_000)), "PNG")))
    whole = encoded(gradient(300, 300), "PNG")
    for damaged in (whole[: len(whole) // 2], whole[:60], whole[:40] + b"\0" * 40 + whole[80:]):
        with pytest.raises(DocumentError, match="damaged PNG image"):
            read_image_file(io.BytesIO(damaged))
    with pytest.raises(DocumentError, match="not an image that can be read"):
        read_image_file(io.BytesIO(b"BMW builds cars and motorcycles in Munich."))
    with pytest.raises(DocumentError, match="larger than"):
        read_image_file(io.BytesIO(whole), limits=Limits(max_bytes=100))
    assert not is_image_file(tmp_path / "nothing.png") and not is_image_file(tmp_path)


def test_grey_of_16_bits_keeps_its_shades():
    shades = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    for kind in ("PNG", "TIFF"):
        read = read_image_file(io.BytesIO(encoded(Image.fromarray(shades), kind))).image
        np.testing.assert_allclose(np.array(read)[..., 0], shades / 257, atol=1)


def test_a_stream_is_read_as_what_it_holds(tmp_path, monkeypatch):
    (tmp_path / "photo.png").write_bytes(encoded(gradient(8, 8), "PNG"))
    (tmp_path / "note.txt").write_text("The lamp is green.")

    class Pipe(io.RawIOBase):
        """A stream that cannot go back."""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            return 0

    for name, kind in (("photo.png", ImageFile), ("note.txt", Document)):
        data = (tmp_path / name).read_bytes()
        with (tmp_path / name).open("rb") as file:
            assert isinstance(read_source(file), kind) and isinstance(read_source(io.BytesIO(data)), kind)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))  # type: ignore[arg-type]
        assert isinstance(read_source("-"), kind)
    with pytest.raises(DocumentError, match="the stream is empty"):
        read_source(Pipe())


def test_a_document_is_no_picture(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_text("This is a text with the wrong name.")
    assert not is_image_file(path)
    assert read_document(path).text.startswith("This is a text")


def write_set(root: Path, classes=("00_red_ball", "01_blue_box", "02_old_hat"), n: int = 3) -> Path:
    for i, folder in enumerate(classes):
        (root / folder).mkdir(parents=True)
        for j in range(n):
            Image.new("RGB", (8, 8), (80 * i, 10 * j, 0)).save(root / folder / f"{j}.png")
    return root


def test_a_folder_and_its_zip_are_the_same_set(tmp_path):
    root = write_set(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    as_folder, as_zip = read_images(root), read_images(tmp_path / "set.zip")
    assert as_folder.names == as_zip.names == ("blue box", "old hat", "red ball")
    assert as_folder.labels == as_zip.labels == (2, 2, 2, 0, 0, 0, 1, 1, 1)
    for i in range(9):
        assert as_zip.load(i).getpixel((0, 0)) == as_folder.load(i).getpixel((0, 0)) == (80 * (i // 3), 10 * (i % 3), 0)


def test_a_set_within_a_folder_of_its_zip_has_its_classes_and_no_files_of_a_mac(tmp_path):
    root = write_set(tmp_path / "set", ("0_mp3_player", "1_boeing_737-800"))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(root.rglob("*.png")):
            archive.write(path, Path("set") / path.relative_to(root))
            archive.writestr(f"__MACOSX/set/{path.parent.name}/._{path.name}", b"\0\5\x16\7")
    found = read_images(tmp_path / "set.zip")
    assert found.names == ("boeing 737-800", "mp3 player") and len(found) == 6


def test_what_is_no_labelled_set_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no folder with images"):
        read_images(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no images at"):
        read_images(tmp_path / "gone")
    (tmp_path / "bad.zip").write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match="no images at"):
        read_images(tmp_path / "bad.zip")
