"""Hypernetworks in files: a config, weights and a model card in a folder or a hub repository.

Format 1 had other names of config keys and tensors, and options that are gone. Shipped hypernetworks keep the old names
of their tensors, so tensors are renamed at every reading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from loracast.base.embedded import HUB_IDS
from loracast.base.fingerprint import Fingerprint
from loracast.errors import ConfigError, HypernetworkError, LoracastError
from loracast.files import folder_of, frozen, value_faults, write_atomically, write_with
from loracast.hypernets.config import NEWER
from loracast.hypernets.reader import READER_FILE
from loracast.lora.quantize import quantise

_ARCHITECTURES: dict[str, type[Pretrained]] = {}
"""By name; `loracast.hypernets` imports the modules of those that it has."""
Modality = Literal["document", "task"]
"""What a hypernetwork casts."""


class Pretrained(nn.Module):
    """A network with a config and the base that it was made for, which is kept in a folder or a hub repository.

    A subclass with a `config_class` of its own is an architecture, whose files `from_pretrained` can read from then on.
    """

    config_class: ClassVar[Any]
    config: Any
    """A frozen dataclass with `target`, and `ranks` by module kind of one chunk or description."""
    made_for: Fingerprint | None = None
    """The base that it was trained for; None until it is trained or loaded."""
    former_ids: tuple[str, ...] = ()
    """Ids under which earlier releases knew the same hypernetwork: adapters that name one of them belong to it."""
    reader_file: Path | None = None
    """The file of the reader beside it; None where there is none."""
    provenance: Mapping[str, Any] = MappingProxyType({})
    """How it was made, as its config.json says; empty until it is trained or loaded."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "config_class" in vars(cls):
            _ARCHITECTURES[cls.__name__] = cls

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Self:
        """Read a hypernetwork of this class (of any, from `Hypernetwork`) from a folder or a hub repository.

            hypernetwork = loracast.Hypernetwork.from_pretrained("me/my-hypernetwork")
            model = loracast.load("me/my-base", hypernetwork)

        Args:
            revision: branch, tag or commit of the repository.

        Returns:
            the hypernetwork in fp32, in evaluation mode, with the base that it was made for.

        Raises:
            HypernetworkError: missing, damaged, of another class or a newer format.
            ConfigError: its config has faults; the message lists every one.
        """
        from safetensors.torch import load_file

        folder = folder_of(source, _FILES, "hypernetwork", HypernetworkError, revision)
        stored = _stored(folder)
        name, written_as = stored.get("architecture"), stored.get("format")
        if written_as not in (1, FORMAT) or not isinstance(name, str) or name not in _ARCHITECTURES:
            raise HypernetworkError(
                f"{folder} holds {name!r} in format {written_as!r}; this version of loracast reads "
                f"{', '.join(_ARCHITECTURES)} in formats 1 and {FORMAT}: update loracast"
            )
        architecture: type[Any] = _ARCHITECTURES[name]
        if not issubclass(architecture, cls):
            raise HypernetworkError(f"{folder} holds a {name}; this takes a {cls.__name__}")
        try:
            made_for, values = Fingerprint(**stored["made_for"]), stored["config"]
            if faults := value_faults(architecture.config_class, values):
                raise ConfigError(f"bad {architecture.config_class.__name__}: {'; '.join(faults)}")
            config = architecture.config_class(**{key: frozen(value) for key, value in values.items()})
            with torch.device("meta"):  # shapes only: memory is allocated once the file has shown that it holds them
                hypernet = architecture(config)
            tensors = load_file(folder / "model.safetensors")
        except LoracastError:
            raise
        except Exception as error:  # a damaged file makes these readers raise nearly anything
            raise HypernetworkError(_damaged(folder, error)) from error
        weights = _in_fp32(tensors_of_format_1(tensors), folder)
        hypernet.take_weights(weights, folder)
        hypernet.made_for, hypernet.provenance = made_for, stored.get("provenance", {})
        hypernet.former_ids = tuple(stored.get("former_ids", ()))
        hypernet.reader_file = path if (path := folder / READER_FILE).is_file() else None
        if written_as == 1:
            hypernet.former_ids = (former_id(weights, tensors),)
        return hypernet

    def take_weights(self, weights: Mapping[str, Tensor], source: object) -> None:
        """Take the tensors of a file as weights, frozen, in evaluation mode; the network may be on the meta device.

        Raises:
            HypernetworkError: tensors are missing, unknown or of another shape; the message names all.
        """
        try:
            self.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            faults = " ".join(str(error).split())
            raise HypernetworkError(f"{source} is no hypernetwork that fits its config and base: {faults}") from error
        self.eval().requires_grad_(False)

    def save_pretrained(
        self, folder: str | Path, *, storage: str = "bfloat16", provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write config.json, model.safetensors, and a model card, README.md, where its author has not written one.

        Args:
            folder: created if need be; config.json is written last, so that no half-written folder can be read.
            storage: "float32", "bfloat16", or "int8": large matrices in int8 with one scale for each output column, the
                rest in bfloat16. Only float32 keeps its id.
            provenance: how it was made (command, seed, data; `licence` and `figures` for the card), kept in
                config.json; its own if None.
        """
        from safetensors.torch import save_file

        if self.made_for is None:
            raise HypernetworkError("this hypernetwork names no base: set `made_for` before it is saved")
        if storage not in STORAGE:
            raise ConfigError(f"unknown storage {storage!r}; one of {', '.join(STORAGE)}")
        provenance = self.provenance if provenance is None else provenance
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            value = value.detach().cpu()
            if storage == "int8" and value.ndim >= 2 and value.numel() >= _INT8_MIN_NUMEL:
                rows, scale = quantise(value, axis=-2, floor=1e-12)  # scale [..., 1, columns]
                tensors[name], tensors[f"{name}{_SCALE}"] = rows.contiguous(), scale.contiguous()
            else:
                tensors[name] = value.to(torch.float32 if storage == "float32" else torch.bfloat16).contiguous()
        config = {
            "format": FORMAT,
            "architecture": type(self).__name__,
            "made_for": self.made_for.to_dict(),
            "config": dataclasses.asdict(self.config),
            "provenance": dict(provenance),
        }
        write_with(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        card = folder / CARD
        if not card.exists() or GENERATED in card.read_text(encoding="utf-8"):
            write_atomically(card, model_card(self, provenance).encode())
        write_atomically(folder / "config.json", json.dumps(config, indent=1).encode())

    def push_to_hub(
        self,
        repository: str,
        *,
        storage: str = "bfloat16",
        private: bool | None = None,
        revision: str | None = None,
        message: str = "Upload a hypernetwork",
    ) -> str:
        """Write it to a repository of the Hugging Face hub, made if need be; returns the commit's address.

        A model card that the repository has already stays.

        Args:
            repository: `name`, or `owner/name`.
            storage: as in `save_pretrained`.
            private: whether a new repository is private; the owner's default if None.
            revision: branch, made if need be; the main branch if None.
            message: of the commit.

        Raises:
            HypernetworkError: the hub cannot be reached or refuses it.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        hub = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, storage=storage)
            try:
                made = hub.create_repo(repository, private=private, exist_ok=True).repo_id
                if revision is not None:
                    hub.create_branch(made, branch=revision, exist_ok=True)
                if hub.file_exists(made, CARD, revision=revision):
                    (Path(folder) / CARD).unlink()
                return hub.upload_folder(
                    repo_id=made, folder_path=folder, revision=revision, commit_message=message
                ).commit_url
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                raise HypernetworkError(
                    f"the hub did not take the hypernetwork as {repository!r}: log in with `hf auth login`, and check "
                    f"the name ({(str(error).splitlines() or [type(error).__name__])[0]})"
                ) from error

    @property
    def modality(self) -> Modality:
        """Which modality it casts."""
        raise NotImplementedError

    @property
    def id(self) -> str:
        """Short sha256 of config and weights together, by which an adapter names the hypernetwork that made it."""
        config = dataclasses.asdict(self.config)
        for key in dataclasses.fields(self.config):
            if NEWER in key.metadata and config[key.name] == key.default:
                del config[key.name]
        return _hash(self.state_dict(), json.dumps(config, sort_keys=True).encode())


H = TypeVar("H", bound=Pretrained)

_FORMER_ARCHITECTURES = {"AttendingToLoRA": "AttentionDeltaToLoRA"}
_CONFIG_KEYS = {
    "lead_in": "prefix",
    "document_independent_rank": "static_rank",
    "shared_modules": "static_modules",
    "most_summed_chunks": "max_unscaled_chunks",
    "memory_merge_ridge": "key_decorrelation",
    "probe": "dummy_input",
    "probe_answer": "dummy_answer",
    "recall_rank": "task_bank_rank",
    "recall_width": "task_bank_width",
    "recalled": "bank_sizes",
    "n_known": "n_seen",
}
_GONE: dict[str, Any] = {
    **dict.fromkeys(("among_latents", "whitened", "gated_projection"), False),
    **dict.fromkeys(("weighting_width", "n_encoder_blocks", "n_latents", "n_latent_mlps"), 0),
    "factorised_queries": True,
    "reading_strength": 1.0,
    "weighting_dropout": None,
}
"""Options that are gone, with the value at which each had no effect; None if no value of its own had one."""
_TENSORS = {
    "document_independent.": "static.",
    "reading.": "encoder_lora.",
    "recall.entries": "task_bank.keys",
    "recall.": "task_bank.",
    "known": "seen",
}
_UNITS = (".in_scale", ".out_scale")
"""Endings of names of buffers that were all ones unless `whitened` was set."""


def config_of_format_1(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture and config of a config.json of format 1, under their current names.

    Raises:
        ConfigError: it uses an option that is gone.
    """
    architecture = str(stored.get("architecture"))
    architecture, values = _FORMER_ARCHITECTURES.get(architecture, architecture), stored["config"]
    used = [key for key, idle in _GONE.items() if idle is not None and values.get(key, idle) != idle]
    if used:
        raise ConfigError(f"trained with {', '.join(used)}, which this version no longer has: use loracast 0.1.0")
    keys = _CONFIG_KEYS | ({"shared_rank": "static_modules_rank"} if architecture == "DocToLoRA" else {})
    config = {keys.get(key, key): value for key, value in values.items() if key not in _GONE}
    return {"architecture": architecture, "config": config}


def tensors_of_format_1(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their current names, without buffers that are gone; current names stay as they are."""
    return {_renamed(name, _TENSORS): value for name, value in stored.items() if not _is_idle(name, value)}


def former_id(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """The id that loracast 0.1 gave a hypernetwork: a hash of its weights alone, under their old names.

    Args:
        weights: in fp32, under their current names.
        stored: the tensors of the file.
    """
    back = {new: old for old, new in _TENSORS.items()}
    old = {_renamed(name, back): value for name, value in weights.items()}
    old |= {name: value.float() for name, value in stored.items() if _is_idle(name, value)}
    return _hash(old)


def _hash(tensors: Mapping[str, Tensor], config: bytes = b"") -> str:
    """Short sha256 of a config and tensors."""
    digest = hashlib.sha256(config)
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _is_idle(name: str, value: Tensor) -> bool:
    return name.endswith(_UNITS) and bool((value == 1).all())


_FILES = ("config.json", "model.safetensors", READER_FILE)
CARD = "README.md"
GENERATED = "<!-- Written by loracast, and written anew with the weights until this line is deleted. -->"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_USES = {
    "document": ("hypernetwork", 'manual = model.learn("manual.pdf")', "How long is the warranty?", "manual"),
    "task": ("task_hypernetwork", 'shout = model.task("Answer in capital letters.", "shout")', "river", "shout"),
}
"""By modality: the argument of `loracast.load`, how an adapter is made, and a question to it by its name."""
_UNKNOWN = "Not recorded: to be filled in by whoever publishes this."


def model_card(hypernet: Pretrained, provenance: Mapping[str, Any]) -> str:
    """The card in markdown, with the front matter that the Hugging Face hub reads.

    Args:
        provenance: how the hypernetwork was made, as in config.json: `history` (or `average_of`) as training records
            it; `licence`, a short name such as "apache-2.0", and `figures`, a name and number each, from its author.
    """
    assert hypernet.made_for is not None
    base = hypernet.made_for.base
    base = Path(base).name if Path(base).is_absolute() else base  # not where it lies on this machine
    hub_id = HUB_IDS.get(base, base)
    licence = provenance.get("licence")
    option, learn, question, adapter = _USES[hypernet.modality]
    steps = list(_steps(provenance))
    ranks = ", ".join(f"{rank} in {kind}" for kind, rank in hypernet.config.ranks.items() if rank)
    n_parameters = sum(parameter.numel() for parameter in hypernet.parameters())
    front = [
        "---",
        "library_name: loracast",
        f"license: {licence or 'other'}",
        *([f"base_model: {hub_id}"] if _HUB_ID.fullmatch(hub_id) else []),
        f"tags: [lora, hypernetwork, {hypernet.modality}-to-lora]",
        "---",
        GENERATED,
    ]
    use = [
        "```python\nimport loracast\n\n# FOLDER: this repository, or a folder with it",
        f'model = loracast.load("{base}", {option}="FOLDER")\n{learn}\nmodel.ask("{question}", {adapter})\n```',
    ]
    sections = {
        "Base": f"`{hub_id}`; other bases are refused (fingerprints: shapes {hypernet.made_for.config}, weights "
        f"{hypernet.made_for.norms}).",
        "Shape": f"{n_parameters / 1e6:.1f} million parameters; LoRAs of rank {ranks}.",
        "Data": "\n".join(dict.fromkeys(f"- {name}" for step in steps for name in _data_of(step))),
        "Training": "\n".join(f"    {step['command']}" for step in steps if step.get("command")),
        "Figures": "\n".join(f"- {name}: {value}" for name, value in provenance.get("figures", {}).items()),
        "Licence": licence,
    }
    parts = [
        "\n".join(front),
        f"# {type(hypernet).__name__} for {hub_id}",
        f"A hypernetwork that casts {hypernet.modality}s into LoRAs for a frozen language model in one forward pass.",
        "\n".join(use),
        *(f"## {title}\n\n{text or _UNKNOWN}" for title, text in sections.items()),
    ]
    return "\n\n".join(parts) + "\n"


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
    if "tasks" in step:
        yield f"{len(step['tasks'])} tasks: {', '.join(step['tasks'])}"
    for key, value in step.get("data", {}).items():
        is_named = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if is_named and not key.endswith(("_kinds", "_share")):
            yield from value


FORMAT = 2
STORAGE = ("float32", "bfloat16", "int8")
_SCALE = ".int8_scale"
_INT8_MIN_NUMEL = 100_000  # smaller tensors gain nothing and are the more delicate ones


def read_made_for(source: str | Path) -> Fingerprint:
    """The base that a hypernetwork was made for, from config.json alone. Raises as `from_pretrained` does."""
    folder = folder_of(source, _FILES, "hypernetwork", HypernetworkError)
    try:
        return Fingerprint(**_stored(folder)["made_for"])
    except (KeyError, TypeError) as error:
        raise HypernetworkError(_damaged(folder, error)) from error


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance that `save_pretrained` kept in a folder."""
    return _stored(folder).get("provenance", {})


def _in_fp32(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Stored tensors in fp32. Raises HypernetworkError that names all whose numbers cannot be used."""
    weights, problems = {}, []
    for name, value in tensors.items():
        scale, whole = tensors.get(f"{name}{_SCALE}"), tensors.get(name.removesuffix(_SCALE))
        if name.endswith(_SCALE) and whole is not None and whole.dtype == torch.int8:
            continue
        if value.dtype == torch.int8 and scale is not None and scale.shape == (*value.shape[:-2], 1, value.shape[-1]):
            value = value.float() * scale.float()
        if not value.is_floating_point():
            problems.append(f"{name} is of type {value.dtype} without a scale that fits")
        elif not torch.isfinite(value).all():
            problems.append(f"{name} holds numbers that are not finite")
        weights[name] = value.float()
    if problems:
        raise HypernetworkError(f"{folder} is not a hypernetwork that can be used: {'; '.join(problems)}")
    return weights


def _stored(folder: Path) -> dict[str, Any]:
    """config.json of a hypernetwork's folder under its current names; `format` stays as it was."""
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise HypernetworkError(_damaged(folder, error)) from error
    if stored.get("format") == 1 and isinstance(stored.get("config"), dict):
        stored |= config_of_format_1(stored)
    return stored


def _damaged(folder: Path, error: Exception) -> str:
    """What is said of a folder whose files cannot be read."""
    what = f"{type(error).__name__}: {error}"
    return f"{folder} is damaged or no hypernetwork: it needs a config.json and a whole model.safetensors ({what})"
