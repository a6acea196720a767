"""Memory of an engine: what requests took goes back to the system when they end."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch

from loracast.base.generate import Sampling
from loracast.lora.algebra import LoRA
from loracast.lora.factors import Factors
from loracast.serving.attention import OwnCache, SlotCache
from loracast.serving.engine import LocalEngine
from loracast.serving.generation import EngineConfig, GenerationRequest, Ticket
from loracast.serving.packed_lora import LoRABatcher, SharedParts
from tiny import PROSE

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are counted and given back on Linux alone")
LAYERS, HEADS, SIZE = 3, 2, 16


def resident_pages(block: torch.Tensor) -> int:
    """The pages of a tensor's memory that the system provides."""
    storage = block.untyped_storage()
    n = -(-storage.nbytes() // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * n)()
    address = ctypes.c_void_p(storage.data_ptr())
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(storage.nbytes()), found) == 0
    return sum(page & 1 for page in found)


def row_of(n_tokens: int) -> OwnCache:
    row = OwnCache(LAYERS, n_tokens)
    for layer in range(LAYERS):
        row.write(layer, 0, *torch.randn(2, HEADS, n_tokens, SIZE))
    return row


@on_linux
def test_a_freed_slot_gives_its_pages_back_and_others_keep_their_numbers():
    slots, rows = SlotCache(3, 1000), [row_of(n) for n in (30, 300, 900)]  # slots that are no whole number of pages
    for slot, row in enumerate(rows):
        slots.adopt(slot, row, row.capacity)
    keys, values = slots.layer(1)
    assert keys.shape == (3, HEADS, 1000, SIZE)
    full = resident_pages(keys)
    slots.free(1, 300)
    assert full - resident_pages(keys) >= 2 * LAYERS * HEADS * 300 * SIZE * 4 // mmap.PAGESIZE
    assert not keys[1].any() and not values[1].any()
    slots.move(2, 1, 900)
    for slot, row in ((0, rows[0]), (1, rows[2])):
        for side, own in zip((keys, values), row.sides, strict=True):
            assert torch.equal(side[slot, :, : row.capacity], own[1])
    slots.free(0, 30)
    slots.free(1, 900)
    assert resident_pages(keys) == 0


def test_a_freed_slot_holds_zeros_also_where_a_number_overflowed():
    slots, row = SlotCache(2, 64), row_of(20)
    row.sides[0][:] = float("inf")
    slots.adopt(1, row, 20)
    slots.free(1, 20)
    assert not any(side.any() for layer in range(LAYERS) for side in slots.layer(layer))


@on_linux
def test_requests_of_growing_length_leave_no_pages_of_slots(base):
    engine = LocalEngine(base, EngineConfig(n_slots=3, prefix_bytes=0))

    def ask(n_words: int, n_tokens: int) -> Ticket:
        prompt = base.chat.prompt(" ".join((PROSE * 3).split()[:n_words]))
        return engine.submit(GenerationRequest(prompt, sampling=Sampling(n_tokens, min_new_tokens=n_tokens)))

    for ticket in [ask(2 + 20 * i, 4 + i) for i in range(10)]:
        assert ticket.text()
    long = ask(150, 200)
    for _ in zip(range(20), long, strict=False):
        pass
    slots = engine._batch._slots
    assert resident_pages(slots.layer(0)[0]) > 0
    engine.close()
    assert resident_pages(slots.layer(0)[0]) == 0


def n_blocks(tensors) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


def test_a_row_and_a_group_of_loras_take_one_block_each(base):
    assert n_blocks(row_of(5).sides) == 1
    loras, shared = LoRABatcher(base.model, 4), SharedParts(base.device, base.model.dtype)

    def some_lora() -> LoRA:
        modules = {name: m for name, m in base.model.named_modules() if name.endswith(("down_proj", "o_proj"))}
        sides = {name: (torch.randn(3, m.in_features), torch.randn(m.out_features, 3)) for name, m in modules.items()}
        return LoRA({name: Factors(*pair) for name, pair in sides.items()})

    places = [loras.add(shared.pack(some_lora())) for _ in range(2)]
    group = places[0].group
    assert places[1].group is group and n_blocks([*group.a.values(), *group.b.values()]) == 1
