"""`loracast eval image`: does the text-only base say what images show?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.eval_common import Out, Seed, show
from loracast.cli.output import progress_bar, say
from loracast.cli.session import open_answerer

PerClass = Annotated[int | None, typer.Option(help="Most images of each class; all by default.", min=1)]


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
    from loracast.base.fingerprint import check
    from loracast.base.load import DEFAULT_BASE
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.data.labelled import read_images
    from loracast.evaluation.modality import ModalityEvalConfig, evaluate_modality
    from loracast.evaluation.modality_plots import confusion, sheet
    from loracast.evaluation.plots import require_matplotlib

    require_matplotlib()
    known, test = read_images(trained_on), read_images(images)
    where = hypernetwork or shipped_hypernetwork(base or DEFAULT_BASE, "image")
    caster = load_caster(where, "image", encoder=encoder, say=say)
    loaded = open_answerer(base, None, device).base
    check(caster.made_for, loaded.fingerprint, "the hypernetwork")
    config = ModalityEvalConfig(per_class=per_class, seed=seed)
    with progress_bar("answers") as progress:
        report, answers = evaluate_modality(loaded, caster, known, test, config, out, progress)
    confusion(out / "confusion.png", answers, "images, by the likeliest name")
    sheet(out / "sheet.png", answers, test, seed)
    show(report, out, as_json)
    if not as_json:
        to_lora, with_lora, plain = (
            report.settings[k] for k in ("to_lora_s", "first_token_s", "first_token_of_base_s")
        )
        say(
            f"one image to a LoRA {1000 * to_lora:.0f} ms; first token {1000 * with_lora:.0f} ms, of the base {1000 * plain:.0f} ms"
        )
