"""Compares the adapters that other numbers of threads and other instruction sets make of the same document and task.

    python benchmarks/determinism.py [--document examples/manual.pdf]

Each setting learns twice in processes of its own. Printed are whether both made the same version, and how far its
factors are from those of the first setting: the largest |x - y| / |y| of a tensor, and of a module's weight change.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import unittest.mock
from pathlib import Path

import typer

TASK = "Answer with the opposite word"
QUESTIONS = (
    "Who designed the Quillmere D-27?", "How long does the warranty of the Quillmere D-27 last?", "What does it weigh?",
    "What is the service line's number?", "How often must the filter be cleaned?", "Where is it made?",
)  # fmt: skip
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "one thread": ({}, "float32"),
    "two threads": ({"OMP_NUM_THREADS": "2"}, "float32"),
    "PyTorch's own kernels in AVX2": ({"ATEN_CPU_CAPABILITY": "avx2"}, "float32"),
    "all in AVX2": (AVX2, "float32"),
    "the base in bf16": ({}, "bfloat16"),
}
"""By name: what the environment adds to one thread, and the type in which the base is loaded."""


def learn(document: str, library: Path, dtype: str) -> tuple[list[str], list[str]]:
    """Learn the document and the task: their versions, and the answers to the questions."""
    import loracast

    model = loracast.load(library=library, device="cpu", dtype=dtype)
    adapters = [model.learn(document, "document", storage="bf16"), model.task(TASK, "task")]
    answers = [*model.ask(list(QUESTIONS), adapters[0]), *model.ask(["hot", "tall"], adapters[1])]
    return [adapter.manifest.version for adapter in adapters], answers


def distances(library: Path, other: Path, name: str) -> tuple[float, float]:
    """How far the factors of a name in one library are from those in another: by tensor, by module of its chunks."""
    import torch
    from safetensors.torch import load_file

    from loracast.library.library import Library

    pair = [Library(folder).open(name) for folder in (library, other)]
    stored, reference = (load_file(adapter.folder / "factors.safetensors") for adapter in pair)
    by_tensor = max(
        float(torch.dist(stored[key].float(), value.float()) / value.float().norm())
        for key, value in reference.items()
        if value.is_floating_point() and value.any()
    )
    by_module = 0.0
    for chunk in range(pair[0].manifest.n_chunks):
        one, two = (adapter.lora([chunk], dense=False).to(dtype=torch.float32) for adapter in pair)
        for module in two.names:
            delta = two.delta(module)
            by_module = max(by_module, float(torch.dist(one.delta(module), delta) / delta.norm()))
    return by_tensor, by_module


def main(document: str = "examples/manual.pdf") -> None:
    """Compare the adapters that several settings make of a document and a task."""
    with tempfile.TemporaryDirectory() as folder:
        made: dict[tuple[str, int], tuple[list[str], list[str]]] = {}
        first = next(iter(SETTINGS))
        for setting, (added, dtype) in SETTINGS.items():
            for run in range(2):
                with (
                    unittest.mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **added}),
                    multiprocessing.get_context("spawn").Pool(1) as pool,  # a new Python, which reads the environment
                ):
                    made[setting, run] = pool.apply(learn, (document, Path(folder) / f"{setting}-{run}", dtype))
            same = made[setting, 0] == made[setting, 1]
            print(f"{setting}: {'the same' if same else 'other'} bits in a second process", flush=True)
            if setting != first:
                for name in ("document", "task"):
                    tensor, module = distances(Path(folder) / f"{setting}-0", Path(folder) / f"{first}-0", name)
                    print(f"  {name}: {tensor:.1e} by tensor, {module:.1e} by module")
                pairs = zip(made[setting, 0][1], made[first, 0][1], strict=True)
                equal = [one == other for one, other in pairs]
                print(f"  {sum(equal)} of {len(equal)} answers equal")


if __name__ == "__main__":
    typer.run(main)
