"""`loracast models`: the bases and hypernetworks that are known by name, what they take, and which are in the cache."""

from __future__ import annotations

from dataclasses import asdict

from loracast.cli import options
from loracast.cli.output import print_json, print_table


def models(*, as_json: options.Json = False) -> None:
    """List the embedded bases, the hypernetworks that ship, and the published ones with their bases.

    Sizes of models that are not on this machine are computed from their published configs; nothing is fetched.
    """
    from loracast.cast.known import WINDOW, known_bases, known_hypernetworks

    bases, hypernetworks = known_bases(), known_hypernetworks()
    if as_json:
        listed = [{**asdict(one), "memory": one.memory} for one in hypernetworks]
        print_json({"window": WINDOW, "bases": [asdict(one) for one in bases], "hypernetworks": listed})
        return
    of_bases, of_hypernetworks = [], []
    for base in bases:
        cached = _gb(base.cached) if base.cached else "no"
        memory = [_gb(base.memory[dtype]) for dtype in ("bfloat16", "float32")]
        of_bases.append((base.name, base.source, _millions(base.n_parameters), _gb(base.disk), *memory, cached))
    for one in hypernetworks:
        cached = f"{_gb(one.cached)}{', converted' * one.converted}" if one.cached else "no"
        sizes = _millions(*one.n_parameters), _gb(*one.disk), _gb(*one.memory)
        of_hypernetworks.append((one.name, one.source, f"{one.modality}s", one.base, *sizes, cached))
    columns = (">parameters", ">disk", ">memory in bf16", ">in float32", "in the cache")
    print_table(("base", "from", *columns), of_bases, wrapped=("base",))
    print()
    more = ("from", "casts", "for the base", ">parameters", ">disk", ">memory", "in the cache")
    print_table(("hypernetwork", *more), of_hypernetworks, wrapped=("hypernetwork", "for the base"))
    print(
        f"\nMemory: of a base, its weights and what generation takes in a context of {WINDOW:,} tokens; of a "
        "hypernetwork, its weights in float32.\nDisk: weights in bf16; of a published hypernetwork, its converted form:"
        " the size of the published file is known once it is fetched.\nText-to-LoRA: a range, since a checkpoint may "
        "be of variant S, M or L."
    )


def _millions(*counts: int) -> str:
    return _span([f"{n / 1e6:,.1f}" for n in counts]) + " M"


def _gb(*n_bytes: int) -> str:
    return _span([f"{n / 1e9:,.2f}" for n in n_bytes]) + " GB"


def _span(numbers: list[str]) -> str:
    """One number, or "fewest to most"."""
    return " to ".join(dict.fromkeys(numbers))
