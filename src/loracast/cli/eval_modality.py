"""`loracast eval image`: a modality that the base does not have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracast.cli.commands import config_from
from loracast.cli.eval_results import Results
from loracast.cli.options import Encoder, Models
from loracast.cli.output import progress_bar, say
from loracast.cli.session import open_base

if TYPE_CHECKING:
    from loracast.evaluation.modality import ModalityEvalConfig


@config_from("loracast.evaluation.modality")
def image(
    images: Annotated[
        Path, typer.Option("--images", help="Images to measure on: a folder or zip file with a folder for each class.")
    ],
    trained_on: Annotated[
        Path, typer.Option("--trained-on", help="Images of the training, from which the linear probe learns.")
    ],
    *,
    encoder: Encoder = None,
    config: ModalityEvalConfig,
    models: Models,
    results: Results,
) -> None:
    """Images that were never trained on: does the text-only base say what they show?

    A linear probe on the same features is the baseline.
    """
    from loracast.base.embedded import DEFAULT_BASE
    from loracast.base.fingerprint import check
    from loracast.cast.load import load_caster, shipped_hypernetwork
    from loracast.data.labelled import read_images
    from loracast.evaluation.modality import evaluate_modality
    from loracast.evaluation.modality_plots import confusion, sheet
    from loracast.evaluation.plots import require_matplotlib

    require_matplotlib()
    known, test = read_images(trained_on), read_images(images)
    where = models.hypernetwork or shipped_hypernetwork(models.base or DEFAULT_BASE, "image")
    caster = load_caster(where, "image", encoder=encoder, say=say)
    base = open_base(models)
    check(caster.made_for, base.fingerprint, "the hypernetwork")
    with progress_bar("answers", is_kept=True) as progress:
        report, answers = evaluate_modality(base, caster, known, test, config, results.out, progress)
    confusion(results.out / "confusion.png", answers, "images, by the likeliest name")
    sheet(results.out / "sheet.png", answers, test, config.seed)
    results.show(report)
    if not results.as_json:
        times = [1000 * report.settings[key] for key in ("to_lora_s", "first_token_s", "first_token_of_base_s")]
        say("one image to a LoRA {:.0f} ms; first token {:.0f} ms, of the base {:.0f} ms".format(*times))
