"""Drawings of things that the shipped hypernetwork for images knows: no photograph, so no licence, is needed."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw


def _canvas(background: tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (224, 224), background)
    return image, ImageDraw.Draw(image)


def banana() -> Image.Image:
    image, draw = _canvas((245, 245, 245))
    draw.chord((30, -20, 200, 180), 20, 160, fill=(250, 215, 60), outline=(150, 120, 20))
    draw.chord((35, -50, 195, 140), 15, 165, fill=(245, 245, 245))
    draw.rectangle((26, 60, 40, 75), fill=(90, 70, 20))
    return image


def goldfish() -> Image.Image:
    image, draw = _canvas((20, 90, 120))
    draw.ellipse((50, 75, 170, 150), fill=(250, 120, 20))
    draw.polygon([(160, 112), (215, 70), (205, 112), (215, 155)], fill=(255, 140, 40))
    draw.polygon([(90, 80), (120, 45), (140, 82)], fill=(255, 150, 50))
    draw.ellipse((68, 98, 80, 110), fill=(255, 255, 255))
    draw.ellipse((71, 101, 77, 107), fill=(0, 0, 0))
    return image


def pizza() -> Image.Image:
    image, draw = _canvas((235, 230, 225))
    draw.ellipse((15, 15, 209, 209), fill=(190, 130, 60))
    draw.ellipse((28, 28, 196, 196), fill=(235, 190, 80))
    for i in range(14):
        x, y = 112 + 18 * math.sqrt(i) * math.cos(2.4 * i), 112 + 18 * math.sqrt(i) * math.sin(2.4 * i)
        draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill=(180, 40, 30), outline=(130, 20, 20))
        draw.ellipse((x + 13, y - 3, x + 19, y + 3), fill=(60, 110, 40))
    return image


def school_bus() -> Image.Image:
    image, draw = _canvas((150, 190, 230))
    draw.rectangle((0, 170, 224, 224), fill=(110, 110, 110))
    for box in ((20, 80, 205, 175), (170, 120, 218, 175)):
        draw.rectangle(box, fill=(250, 190, 20), outline=(40, 30, 0), width=3)
    for x in range(30, 165, 28):
        draw.rectangle((x, 92, x + 20, 118), fill=(40, 50, 60))
    draw.rectangle((20, 135, 205, 140), fill=(20, 20, 20))
    for x in (60, 170):
        draw.ellipse((x - 20, 155, x + 20, 195), fill=(20, 20, 20))
        draw.ellipse((x - 8, 167, x + 8, 183), fill=(150, 150, 150))
    return image


PICTURES = {"banana": banana, "goldfish": goldfish, "pizza": pizza, "school bus": school_bus}
