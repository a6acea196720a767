"""The model card of a hypernetwork: README.md with its base, use, data and history, from what its config.json knows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracast.base.embedded import DEFAULT_BASE

if TYPE_CHECKING:
    from loracast.hypernets.protocol import Hypernetwork

CARD = "README.md"
GENERATED = "<!-- Written by loracast, and written anew with the weights until this line is deleted. -->"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_IDS = {DEFAULT_BASE: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_USES = {
    "document": ("hypernetwork", 'manual = model.learn("manual.pdf")\nmodel.ask("How long is the warranty?", manual)'),
    "task": (
        "task_hypernetwork",
        'shout = model.task("Answer in capital letters.", "shout")\nmodel.ask("river", shout)',
    ),
    "image": (
        "image_hypernetwork",
        'photo = model.learn("photo.jpg")\nmodel.ask("What does the picture show?", photo)',
    ),
}
_UNKNOWN = "Not recorded: to be filled in by whoever publishes this."


def model_card(hypernet: Hypernetwork, provenance: Mapping[str, Any]) -> str:
    """The card in markdown, with the front matter that the Hugging Face hub reads.

    Args:
        provenance: how the hypernetwork was made, as in config.json: `history` (or `average_of`) as training records
            it; `licence`, a short name such as "apache-2.0", and `figures`, a name and number each, from its author.
    """
    assert hypernet.made_for is not None
    base = hypernet.made_for.base
    base = Path(base).name if Path(base).is_absolute() else base  # not where it lies on this machine
    hub_id = _HUB_IDS.get(base, base)
    licence, figures = provenance.get("licence"), provenance.get("figures", {})
    option, use = _USES[hypernet.modality]
    steps = list(_steps(provenance))
    data = dict.fromkeys(name for step in steps for name in _data_of(step))
    front = [
        "---",
        "library_name: loracast",
        f"license: {licence or 'other'}",
        *([f"base_model: {hub_id}"] if _HUB_ID.fullmatch(hub_id) else []),
        f"tags: [lora, hypernetwork, {hypernet.modality}-to-lora]",
        "---",
    ]
    ranks = ", ".join(f"{rank} in {kind}" for kind, rank in hypernet.config.ranks.items() if rank)
    n_parameters = sum(parameter.numel() for parameter in hypernet.parameters())
    sections = [
        "\n".join([*front, GENERATED]),
        f"# {type(hypernet).__name__} for {hub_id}",
        f"A hypernetwork that casts {hypernet.modality}s into LoRAs for a frozen language model in one forward pass.",
        f"```python\nimport loracast\n\n# FOLDER: this repository, or a folder with it\n"
        f'model = loracast.load("{base}", {option}="FOLDER")\n{use}\n```',
        "## Base\n\n"
        f"`{hub_id}`; other bases are refused (fingerprints: shapes {hypernet.made_for.config}, weights "
        f"{hypernet.made_for.norms}).",
        f"## Shape\n\n{n_parameters / 1e6:.1f} million parameters; LoRAs of rank {ranks}.",
        "## Data\n\n" + ("\n".join(f"- {name}" for name in data) or _UNKNOWN),
        "## Training\n\n" + ("\n".join(f"    {step['command']}" for step in steps if step.get("command")) or _UNKNOWN),
        "## Figures\n\n" + ("\n".join(f"- {name}: {value}" for name, value in figures.items()) or _UNKNOWN),
        "## Licence\n\n" + (licence or _UNKNOWN),
    ]
    return "\n\n".join(sections) + "\n"


def _steps(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The trainings behind a checkpoint, those of averaged runs one after the other, each once."""
    seen = []
    for run in provenance.get("average_of", [provenance]):
        for step in _steps(run) if "average_of" in run else run.get("history", []):
            if step not in seen:
                seen.append(step)
                yield step


def _data_of(step: Mapping[str, Any]) -> Iterator[str]:
    """What a training names as its data: files, sources in them, tasks."""
    named = {key: value for key, value in step.get("data", {}).items() if not key.endswith(("_kinds", "_share"))}
    if "tasks" in step:
        yield f"{len(step['tasks'])} tasks: {', '.join(step['tasks'])}"
    for value in named.values():
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            yield from value
