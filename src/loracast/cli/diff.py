"""`loracast diff`: how two adapters differ, layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from loracast.cli import options
from loracast.cli.output import print_json, print_table


def diff(
    name: options.Adapter,
    other: Annotated[str, "The adapter to compare it with."],
    *,
    plot: Annotated[Path | None, "Draw the differences into this PNG file."] = None,
    library: options.Library,
    as_json: options.Json = False,
) -> None:
    """Show how two adapters differ, layer by layer, all chunks of a document merged."""
    from loracast.base.fingerprint import check
    from loracast.library.inspect import differences, total
    from loracast.library.inspect import plot as draw
    from loracast.library.library import open_adapter

    first, second = open_adapter(library, name), open_adapter(library, other)
    check(first.manifest.made_for, second.manifest.made_for, f"the adapter {name!r}")
    found = differences(first.lora(), second.lora())
    a, b, d = (total([getattr(m, field) for m in found]) for field in ("norm", "other_norm", "distance"))
    cosine = (a * a + b * b - d * d) / (2 * a * b) if a and b else 0.0
    if plot is not None:
        kinds = dict.fromkeys(m.kind for m in found)
        lines = {kind: {m.layer: (m.cosine, m.distance) for m in found if m.kind == kind} for kind in kinds}
        draw(lines, plot, f"{name} and {other}", ("cosine", "norm of the difference"))
    if as_json:
        print_json({"cosine": cosine, "norm": a, "other_norm": b, "distance": d, "modules": [asdict(m) for m in found]})
        return
    print_table(
        (">layer", "module", f">norm of {name}", f">norm of {other}", ">cosine", ">difference"),
        (
            (m.layer, m.kind, f"{m.norm:.3g}", f"{m.other_norm:.3g}", f"{m.cosine:.3f}", f"{m.distance:.3g}")
            for m in found
        ),
    )
    print(f"in all: cosine {cosine:.3f}, norms {a:.3g} and {b:.3g}, difference {d:.3g}")
