"""Descriptions become LoRAs, and adapters: Text-to-LoRA at work.

It takes the hypernetwork and its text encoder; the base is needed only where it is the text encoder itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from loracast.base.fingerprint import Fingerprint, check
from loracast.base.load import Base
from loracast.encoders.attention_delta import AttentionDeltaEncoder
from loracast.encoders.features import OF_THE_BASE
from loracast.encoders.sentence import TextEncoder, load_text_encoder
from loracast.errors import AdapterError, EncoderError, HypernetworkError
from loracast.hypernets.attention_delta import AttentionDeltaToLoRA
from loracast.hypernets.store import OfDescriptions, of_descriptions, weights_hash
from loracast.library.adapter import Adapter
from loracast.library.library import check_free
from loracast.library.manifest import check_name, name_from
from loracast.library.save import save_lora, source_of
from loracast.lora.algebra import LoRA
from loracast.paths import library_dir

_AT_ONCE = 50
"""Descriptions in one forward pass of the hypernetwork: twice as many take more than twice the time (docs/experiments.md)."""


class TaskCaster:
    """Casts descriptions of tasks into LoRAs for the base that its hypernetwork was made for."""

    def __init__(
        self,
        hypernet: OfDescriptions,
        made_for: Fingerprint,
        encoder: TextEncoder,
        library: Path,
        in_bf16: bool = False,
    ):
        """
        Args:
            in_bf16: compute matmuls in bf16, as in training: several times faster where the base is in bf16 too.
        """
        if encoder.d_text != hypernet.config.d_text:
            raise HypernetworkError(
                f"the hypernetwork reads embeddings of {hypernet.config.d_text} numbers, the text encoder {encoder.name!r} gives "
                f"{encoder.d_text}: give the encoder that it was trained with ({hypernet.config.encoder!r})"
            )
        self.hypernet, self.made_for, self.encoder, self.library = hypernet.eval(), made_for, encoder, library
        self._in_bf16 = in_bf16
        self.hypernet_hash = weights_hash(hypernet)
        self.ood_threshold = hypernet.ood_threshold()

    @torch.inference_mode()
    def loras(self, descriptions: Sequence[str], strength: float = 1.0) -> list[LoRA]:
        """The LoRAs of some descriptions, all in one pass.

        Args:
            strength: factor on every delta; 0 is no adapter, 1 what the hypernetwork was trained for.
        """
        return self._loras(self._conditions(descriptions), strength)

    @torch.inference_mode()
    def constant_lora(self) -> LoRA:
        """The LoRA of a constant condition, which describes nothing: to measure by."""
        return self._loras(self.hypernet.constant(), 1.0)[0]

    @torch.inference_mode()
    def embeddings(self, descriptions: Sequence[str]) -> torch.Tensor:
        """One vector for each description [n, d]: what the hypernetwork compares descriptions by."""
        return self.hypernet.pooled(self._conditions(descriptions))

    @torch.inference_mode()
    def distances(self, descriptions: Sequence[str]) -> list[float | None]:
        """How far each description is from the nearest one seen in training: 1 - cosine of their embeddings; None where none is known."""
        return self._distances(self._conditions(descriptions))

    def task(
        self, description: str, name: str | None = None, *, strength: float = 1.0, replace: bool = False
    ) -> Adapter:
        """Cast one description into an adapter and keep it, as `tasks` does."""
        return self.tasks([description], None if name is None else [name], strength=strength, replace=replace)[0]

    @torch.inference_mode()
    def tasks(
        self,
        descriptions: Sequence[str],
        names: Sequence[str] | None = None,
        *,
        strength: float = 1.0,
        replace: bool = False,
    ) -> list[Adapter]:
        """Cast descriptions into adapters, in one pass, and keep them.

        A description that is further from all that training has seen than those are from one another is cast all the same; the adapter's
        manifest holds a warning then.

        Args:
            names: of the adapters; made from the descriptions if None.

        Raises:
            AdapterError: a description is empty, or a name is taken or not allowed; nothing is kept then.
        """
        descriptions = [text.strip() for text in descriptions]
        names = [name_from(text) for text in descriptions] if names is None else list(names)
        if len(names) != len(descriptions) or len(set(names)) != len(names):
            raise AdapterError("give each description a name of its own")
        for name, description in zip(names, descriptions, strict=True):
            check_name(name)
            if not replace:
                check_free(self.library, name, unless_from=source_of(description))
        started = time.perf_counter()
        conditions = self._conditions(descriptions)
        loras = self._loras(conditions, strength)
        distances = self._distances(conditions)
        seconds = (time.perf_counter() - started) / max(1, len(loras))
        if not all(factor.isfinite().all() for lora in loras for pair in lora.factors.values() for factor in pair):
            raise AdapterError(
                "the hypernetwork gave numbers that are not finite for these descriptions; nothing is kept"
            )
        return [
            self._keep(name, description, lora, strength, seconds, self._warnings(description, distance), replace)
            for name, description, lora, distance in zip(names, descriptions, loras, distances, strict=True)
        ]

    def _conditions(self, descriptions: Sequence[str]) -> torch.Tensor:
        """What the text encoder gives for n descriptions [n, d_text]."""
        if not all(text.strip() for text in descriptions):
            raise AdapterError("the description of a task is empty; say in a sentence what the model shall do")
        return self.encoder([text.strip() for text in descriptions])

    def _loras(self, conditions: torch.Tensor, strength: float) -> list[LoRA]:
        loras: list[LoRA] = []
        with torch.autocast(conditions.device.type, torch.bfloat16) if self._in_bf16 else nullcontext():
            for some in conditions.split(_AT_ONCE):
                batch = self.hypernet(some)
                loras += [batch.row(i) for i in range(batch.n)]
        return loras if strength == 1 else [lora.scale(strength) for lora in loras]

    def _distances(self, conditions: torch.Tensor) -> list[float | None]:
        if not self.hypernet.config.n_seen:
            return [None] * len(conditions)
        return list(self.hypernet.distances(conditions).tolist())

    def _warnings(self, description: str, distance: float | None) -> tuple[str, ...]:
        if distance is None or self.ood_threshold is None or distance <= self.ood_threshold:
            return ()
        return (
            f"{description!r} is far from every description seen in training (distance {distance:.2f}, usual are up to "
            f"{self.ood_threshold:.2f}): try the adapter before you rely on it, or say it in other words",
        )

    def _keep(
        self,
        name: str,
        description: str,
        lora: LoRA,
        strength: float,
        seconds: float,
        notes: tuple[str, ...],
        replace: bool,
    ) -> Adapter:
        return save_lora(
            lora,
            self.library,
            name,
            kind="task",
            title=description,
            made_for=self.made_for,
            hypernetwork=self.hypernet_hash,
            seconds=seconds,
            strength=strength,
            warnings=notes,
            replace=replace,
        )


def load_caster(
    hypernetwork: str | Path,
    *,
    base: Base | Callable[[], Base] | None = None,
    encoder: str | None = None,
    library: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> TaskCaster:
    """Load a text-to-LoRA hypernetwork with its text encoder.

    Args:
        hypernetwork: a folder or hub repository.
        base: checked against the hypernetwork, and needed where its text encoder is the base; a function is called only then.
        encoder: where the text encoder lies now, if not where it lay in training.
        library: where adapters are kept; the user's own library if None.
        say: told what is being done where the encoder has to be fetched first.
    """
    hypernet, made_for = of_descriptions(hypernetwork)
    by_the_base = isinstance(hypernet, AttentionDeltaToLoRA)
    if callable(base):
        base = base() if by_the_base or (encoder or hypernet.config.encoder) == OF_THE_BASE else None
    if base is not None:
        check(made_for, base.fingerprint, f"the hypernetwork {str(hypernetwork)!r}")
    where = Path(library) if library else library_dir()
    in_bf16 = by_the_base and base is not None and base.model.dtype == torch.bfloat16
    return TaskCaster(hypernet, made_for, encoder_of(hypernet, base, encoder, say), where, in_bf16)


def encoder_of(
    hypernet: OfDescriptions,
    base: Base | None,
    encoder: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> TextEncoder:
    """What a hypernetwork reads descriptions with.

    Args:
        encoder: where the text encoder lies now, if not where it lay in training.

    Raises:
        EncoderError: it reads them with its base, and that is not given, or another encoder is.
    """
    if not isinstance(hypernet, AttentionDeltaToLoRA):
        return load_text_encoder(encoder or hypernet.config.encoder, base, say)
    if base is None or encoder is not None:
        raise EncoderError(
            "this hypernetwork reads descriptions with its base: give the base, and no other text encoder"
        )
    return AttentionDeltaEncoder(base, hypernet)
