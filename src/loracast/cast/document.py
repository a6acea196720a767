"""A document becomes an adapter: text, chunks, features, factors, disk. Memory stays flat in the document's length."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loracast.base.chat import encode_text, encode_with_offsets
from loracast.base.load import Base
from loracast.batching import pad_right
from loracast.documents import Chunk, Document, split_text
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.encoders.hidden_states import ContextEncoder
from loracast.errors import DocumentError
from loracast.library.adapter import Adapter
from loracast.library.library import check_free, find_made_from, give_name
from loracast.library.manifest import Manifest
from loracast.library.writer import AdapterWriter
from loracast.lora.quantize import DEFAULT_STORAGE, Storage

if TYPE_CHECKING:
    from loracast.hypernets.doc_to_lora import DocToLoRA

TOKENS_PER_BATCH = 4096
"""Tokens encoded at once: enough to keep the cores busy, little enough to need no memory to speak of."""

Progress = Callable[[int, int], None]
"""(chunks done, chunks in all)"""


def split_document(base: Base, document: Document, max_tokens: int) -> list[Chunk]:
    """The chunks of a document as this base's tokenizer counts them."""
    chunks = split_text(
        document.text,
        lambda text: encode_with_offsets(base.tokenizer, text),
        max_tokens=max_tokens,
        title=document.title,
    )
    if not chunks:
        raise DocumentError(f"{document.file_name or 'the document'} holds no text")
    return chunks


def expand_chunks(
    base: Base, hypernet: DocToLoRA, encoder: ContextEncoder, prompts: Sequence[str]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The factors of chunks, batch by batch and in order, as the hypernetwork casts them."""
    for ids, mask in prompt_batches(base, prompts):
        yield expand_batch(base, hypernet, encoder, ids, mask)


@torch.inference_mode()
def expand_batch(
    base: Base, hypernet: DocToLoRA, encoder: ContextEncoder, ids: Tensor, mask: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of one batch of chunks, as token ids [n, t] with their mask [n, t]."""
    autocast = torch.autocast(ids.device.type, torch.bfloat16) if base.model.dtype == torch.bfloat16 else nullcontext()
    with autocast:
        return hypernet.cast(encoder(ids, mask))[0]


def prompt_batches(base: Base, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks as token ids [n, t] with their mask [n, t], in order, at most TOKENS_PER_BATCH at a time."""
    batch: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        batch.append(encode_text(base.tokenizer, prompt))
        is_full = max(len(ids) for ids in batch) * (len(batch) + 1) > TOKENS_PER_BATCH
        if is_full or i == len(prompts) - 1:
            ids, mask = pad_right(batch, base.pad_id)
            yield ids.to(base.device), mask.to(base.device)
            batch = []


def shared_factors(hypernet: DocToLoRA) -> dict[str, Tensor]:
    """The document-independent factors, named as in an adapter's file; none where the hypernetwork has none."""
    factors: dict[str, Tensor] = {}
    for kind in hypernet.config.target.kinds:
        if shared := hypernet.static_of(kind):
            factors |= {f"{kind}.shared.a": shared.a.detach(), f"{kind}.shared.b": shared.b.detach()}
    return factors


def recast(base: Base, hypernet: DocToLoRA, encoder: ContextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The factors of chunks as their adapter would hold them, in bf16, the document-independent ones among them."""
    batches = list(expand_chunks(base, hypernet, encoder, prompts))
    rows = {name: value.bfloat16().cpu() for name, value in shared_factors(hypernet).items()}
    for kind in batches[0]:
        for i, side in enumerate("ab"):
            rows[f"{kind}.{side}"] = torch.cat([batch[kind][i] for batch in batches]).bfloat16().cpu()
    return rows


def learn_document(
    base: Base,
    hypernet: DocToLoRA,
    hypernet_hash: str,
    encoder: ContextEncoder,
    document: Document,
    library: Path,
    name: str,
    *,
    max_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    storage: Storage = DEFAULT_STORAGE,
    replace: bool = False,
    progress: Progress = lambda done, total: None,
) -> Adapter:
    """Cast a document into an adapter and keep it under `name`.

    Where the library has it already, made from the same document in the same way, it only gets the name. Nothing is left behind if it fails or
    is killed: the adapter appears in the library when it is whole.
    """
    started = time.perf_counter()
    config = hypernet.config
    chunks = split_document(base, document, max_chunk_tokens)
    manifest = Manifest(
        name=name,
        title=document.title,
        source=document.file_name,
        source_sha256=document.sha256,
        made_for=base.fingerprint,
        hypernetwork=hypernet_hash,
        modules=config.target.rows,
        ranks=config.ranks,
        max_unscaled_chunks=dict(config.merging.max_unscaled_chunks),
        key_decorrelation=dict(config.merging.ridges),
        n_chunks=len(chunks),
        n_tokens=sum(chunk.n_tokens for chunk in chunks),
        max_chunk_tokens=max_chunk_tokens,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        learn_s=0.0,
        warnings=document.warnings,
        storage=storage,
    )
    version = find_made_from(library, manifest.made_from)
    if version is not None:
        return give_name(library, name, version, replace=replace)
    if not replace:
        check_free(library, name)  # now, not after the work
    with AdapterWriter(library, name, config.target, config.ranks, chunks, storage) as writer:
        done = 0
        progress(done, len(chunks))
        if storage == "text":  # its factors are made when it is asked
            progress(len(chunks), len(chunks))
            return writer.finish(manifest, replace=replace)
        writer.open_factors(shared_factors(hypernet))
        for expanded in expand_chunks(base, hypernet, encoder, [chunk.prompt for chunk in chunks]):
            writer.add(expanded)
            done += next(iter(expanded.values()))[0].shape[0]
            progress(done, len(chunks))
        seconds = round(time.perf_counter() - started, 3)
        return writer.finish(dataclasses.replace(manifest, learn_s=seconds), replace=replace)
