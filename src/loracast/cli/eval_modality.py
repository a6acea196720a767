"""`loracast eval image | signal`: senses that the base does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loracast.cli import options
from loracast.cli.eval_common import Out, Seed, show
from loracast.cli.output import progress_bar, say
from loracast.cli.session import open_answerer

PerClass = Annotated[int | None, typer.Option(help="Most things of each class; all by default.", min=1)]


def image(
    out: Out,
    images: Annotated[Path, typer.Option(help="Images to measure on: a folder or zip file, a folder for each class.")],
    trained_on: Annotated[Path, typer.Option(help="Images of the training: the linear probe learns from them.")],
    hypernetwork: Annotated[
        str | None,
        typer.Option(
            "--hypernetwork", help="Folder or hub id of a hypernetwork for images; the shipped one by default."
        ),
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Where its image encoder lies, if not where it lay.")] = None,
    per_class: PerClass = None,
    seed: Seed = 0,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Images that were never trained on: does the text-only base say what they show? Beside a linear probe on the same features."""
    from loracast.base.load import DEFAULT_BASE
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.data.labelled import read_images
    from loracast.evaluation.plots import require_matplotlib

    require_matplotlib()
    known, test = read_images(trained_on), read_images(images)
    where = hypernetwork or shipped_hypernetwork(base or DEFAULT_BASE, "image")
    caster = load_caster(where, "image", encoder=encoder, say=say)
    _evaluate(caster, known, test, out, per_class, seed, base, device, as_json)


def signal(
    out: Out,
    hypernetwork: Annotated[str, typer.Option(help="Folder that `loracast train signal` made.")],
    per_class: PerClass = 50,
    seed: Seed = 0,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Generated time series that were never trained on, beside a linear probe on the same patches."""
    from loracast.data.labelled import make_signals
    from loracast.encoders.signal import SignalEncoder
    from loracast.evaluation.plots import require_matplotlib
    from loracast.hypernets.protocol import Caster
    from loracast.hypernets.store import from_pretrained

    require_matplotlib()
    caster = Caster(from_pretrained(hypernetwork), SignalEncoder())
    test = make_signals(1_000 + seed, per_class or 50)
    _evaluate(caster, make_signals(0, 400), test, out, per_class, seed, base, device, as_json)


def _evaluate(
    caster: Any,
    known: Any,
    test: Any,
    out: Path,
    per_class: int | None,
    seed: int,
    base: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    from loracast.base.fingerprint import check
    from loracast.evaluation.modality import SenseEvalConfig, evaluate_sense
    from loracast.evaluation.modality_plots import confusion, sheet

    loaded = open_answerer(base, None, device).base
    check(caster.made_for, loaded.fingerprint, "the hypernetwork")
    config = SenseEvalConfig(per_class=per_class, seed=seed)
    with progress_bar("answers") as progress:
        report, saw = evaluate_sense(loaded, caster, known, test, config, out, progress)
    confusion(out / "confusion.png", saw, f"{test.sense}s, by the likeliest name")
    sheet(out / "sheet.png", saw, test, seed)
    show(report, out, as_json)
    if not as_json:
        to_lora, with_lora, plain = (
            report.settings[k] for k in ("to_lora_s", "first_token_s", "first_token_of_base_s")
        )
        say(
            f"one {test.sense} to a LoRA {1000 * to_lora:.0f} ms; first token {1000 * with_lora:.0f} ms, of the base {1000 * plain:.0f} ms"
        )
