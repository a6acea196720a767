"""What a type checker sees of the public API: checked by mypy, never run. Each ignored line is an error, or mypy says so."""

from __future__ import annotations

from pathlib import Path

import loracast


def sees(paths: list[Path], note: loracast.Document) -> None:
    model = loracast.load("base", dtype="float32", device_map="auto", revision="v2")
    one: str = model.ask("Who?", "manual", always=True, sampling=loracast.Sampling(top_k=3))
    several: list[str] = model.ask(["Who?", "Where?"], ["manual", ()])
    chat: str = model.ask([{"role": "user", "content": "Who?"}], model.cast("a.pdf"))
    adapters: list[loracast.Adapter] = model.learn(paths, storage="bf16")
    loras: list[loracast.LoRA] = model.cast([note, "a.pdf"])
    for piece in model.stream("Who?"):
        piece.upper()
    model.task("Answer in capital letters.", strength=0.5)
    print(one, several, chat, adapters, loras)

    model.ask("Who?", temprature=1)  # type: ignore[call-overload]
    model.learn("a.pdf", chunk_tokens=3)  # type: ignore[call-overload]
    model.task("Answer in capital letters.", strenght=0.5)  # type: ignore[call-arg]
    wrong: list[str] = model.ask("Who?")  # type: ignore[assignment]
    print(wrong)
