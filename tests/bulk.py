"""Documents to cast in bulk, some of them broken, and what the adapters in a folder hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

NOT_LEARNED = {
    "empty.txt": "",
    "broken.pdf": "this is no PDF",
    "picture.png": "not looked at",
    ".hidden.txt": "not looked at",
    ".git/config.txt": "not looked at",
}
"""Files of a folder that are no documents, or that cannot be read: the first two are reported."""
FAULTS = {".pdf": b"no PDF", ".txt": b"", ".docx": b"PK\x03\x04 cut off"}
"""Files that cannot be read, by their ending."""


def make_documents(folder: Path, n: int, n_broken: int) -> Path:
    """Write so many short texts, and so many files that cannot be read."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        (folder / f"note-{i}.txt").write_text(
            f"The lamp number {i} was made in the north. The code of lantern {i} is {7 * i}."
        )
    for i in range(n_broken):
        ending = list(FAULTS)[i % len(FAULTS)]
        (folder / f"broken-{i}{ending}").write_bytes(FAULTS[ending])
    return folder


def config_files(out: Path) -> list[Path]:
    """The configs of the adapters in a folder: where one is there, the adapter is whole."""
    return sorted(out.glob("*/adapter_config.json"))


def weights_of(out: Path) -> dict[str, dict[str, str]]:
    """A hash of each tensor of all adapters in a folder, by the adapters' and the tensors' names."""
    import torch
    from safetensors.torch import load_file

    def hash_of(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

    return {
        path.parent.name: {
            name: hash_of(tensor) for name, tensor in load_file(path.parent / "adapter_model.safetensors").items()
        }
        for path in config_files(out)
    }
