"""Learn one document in a process of its own and print what it took, as one line of JSON.

cost.py runs it as `python -m loracast.lab.evaluation.learn_once ORDER`, so that neither an earlier document nor the
parent's memory counts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from loracast.answering.model import Model, load
from loracast.cast.document import split_document, token_batches
from loracast.documents import Document
from loracast.lab.evaluation.runner import peak_memory

_MIB = 2**20


def main(order: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, learn, then time casting against the encoder alone, batch by batch."""
    model = load(order["base"], order["hypernetwork"], library=order["library"], **order["how"])
    caster = model.documents
    text = Path(order["text"]).read_text(encoding="utf-8")
    document = Document.from_text(text)  # its hash tells it from the lengths before, which the library has
    with torch.inference_mode():  # reads all the weights: before their first use they may not be in memory at all
        warm = next(token_batches(model.base, ["Warm up."]))
        model.base.model(torch.tensor(warm, device=model.base.device))
        caster.cast(caster.encode(warm))
    with peak_memory() as peak:
        started = time.perf_counter()
        adapter = model.learn(document, Path(order["text"]).stem, max_chunk_tokens=order["chunk_tokens"])
        learn_s = time.perf_counter() - started
    cast_s, encode_s = _cast_times(model, document, order["chunk_tokens"])
    return {
        "n_tokens": adapter.manifest.n_tokens,
        "n_chunks": adapter.manifest.n_chunks,
        "base_mib": peak.before_mib,
        "above_base_mib": peak.above_mib,
        "learn_s": learn_s,
        "cast_s": cast_s,
        "encode_s": encode_s,
        "ratio": cast_s / encode_s,
        "adapter_mib": adapter.n_bytes / _MIB,
        "kb_per_token": adapter.n_bytes / 1000 / adapter.manifest.n_tokens,
    }


@torch.inference_mode()
def _cast_times(model: Model, document: Document, chunk_tokens: int) -> tuple[float, float]:
    """Seconds to encode and cast all chunks, and to encode them only (to the layer that is read).

    Both run on each batch in turn, so that whatever else the machine does meets both alike.
    """
    prompts = [chunk.prompt for chunk in split_document(model.base, document, chunk_tokens)]
    cast_s = encode_s = 0.0
    for batch in token_batches(model.base, prompts):
        started = _now(model)
        model.documents.encode(batch)
        between = _now(model)
        model.documents.cast(model.documents.encode(batch))
        encode_s += between - started
        cast_s += _now(model) - between
    return cast_s, encode_s


def _now(model: Model) -> float:
    if model.base.device.type == "cuda":
        torch.cuda.synchronize(model.base.device)
    return time.perf_counter()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
