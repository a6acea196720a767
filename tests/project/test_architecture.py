"""The architecture page names modules that exist, and its picture is what the command draws from the code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRAWN = runpy.run_path(str(ROOT / "docs" / "architecture.py"))


def test_the_page_names_modules_and_rooms_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)+\.py)`", page)
    assert len(named) > 15
    for module in named:
        assert (ROOT / module).is_file() or (ROOT / "src" / "loracast" / module).is_file(), module
    table = "".join(line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", table)) == DRAWN["rooms"]().keys()


def test_the_picture_has_every_room_on_its_floor():
    """If this fails, rooms have changed: `python docs/architecture.py`."""
    kept = (ROOT / "docs" / "images" / "architecture.svg").read_text()
    places = {name: float(y) for y, name in re.findall(r'y="(\d+)" class="name">(\w+) ', kept)}
    floors = DRAWN["floors"](DRAWN["arrows"]())
    assert places.keys() == floors.keys()
    order = sorted(floors, key=lambda name: (floors[name], name))
    assert order == sorted(places, key=lambda name: (-places[name], name))


def test_rooms_that_import_each_other_are_refused():
    with pytest.raises(ValueError, match="one -> two -> one"):
        DRAWN["floors"]({"one": {"two"}, "two": {"one"}})
