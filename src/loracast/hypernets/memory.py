"""An associative memory written into a few modules: every token of a chunk can store "where this key comes in, say me".

A linear map that adds value_t <key_t, x> over the tokens t is a LoRA with A rows key_t and B columns value_t (fast weights:
Schlag et al., arXiv 2102.11174). Four kinds of keys find a token again, and add up:

- what entered the same module at the token before it, so that an answer goes on as the chunk did;
- what entered at tokens that it attends to, such as its sentence's subject: some heads of the base carry the subject of
  a question to the position of the answer, where it looks much as it did in the chunk;
- what entered at the end of its sentence, where the base has seen all of it: a linear map says how a question about such a
  sentence would look at its own end;
- what enters, whatever the document, at the first, second, third token of an answer: the token's place in its value.

A learned metric, at first the whitening of what enters the module, makes keys of different subjects nearly orthogonal, and
least squares takes away what the keys of a chunk still have in common, so that many facts, and many chunks, fit side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.encoders.features import Features
from loracast.hypernets.cca import cca_map
from loracast.hypernets.doc_config import DocToLoRAConfig
from loracast.hypernets.heads import per_layer
from loracast.hypernets.perceiver import ReaderBlock, RMSNorm, rotate

_GATES = ("say it", "begin with it", "stop")
OWNER, END = range(2)
"""Heads whose looks training can name: at the token that ends the owner's name, and at the one that ends the sentence."""
N_PLACES = 8
"""Places in an answer that are told apart; the last one stands for all after it."""
_HEAD_DIM = 32
_START_GATE = -2.0
_START_RIDGE = 2.0
_MAP_STD = 0.1
_RIDGE = 0.3  # of the whitening, in units of the variance of one number that enters
# Adam moves every number by about the learning rate: what must grow by tens or by halves is stored smaller by these factors.
_SCALE_RATE = 400.0
_STRENGTH_RATE = 10.0


@dataclass(frozen=True)
class MemoryWrites:
    """What a memory decided for the tokens of n chunks: for an objective that knows better."""

    pointer_scores: Tensor
    """[n, heads, t, t]: where each token looks for its keys, before the softmax."""
    gate_logits: Tensor
    """[n, t, 3]: whether a token is said, begins an answer, ends one."""
    place_logits: Tensor
    """[n, t, N_PLACES]: which place in an answer a token takes."""
    tokens: Tensor | None = None
    """[n, r]: the tokens that are written, in the order of the factors; None before that is decided."""
    weights: Tensor | None = None
    """[modules]: how much each module adds to what is said, of all of them together."""


class AssociativeMemory(nn.Module):
    """Features -> for each module of the memory A [n, modules, r, in] and B rows [n, modules, r, out]: r tokens' worth.

    The r tokens whose gates are most open are written. Its start is an exact no-op, because `scale` starts at zero.
    """

    key_std: Tensor

    def __init__(self, c: DocToLoRAConfig):
        super().__init__()
        n_modules, d_in = len(c.memory_modules), c.memory_modules[0][3]
        self.rank, self.n_heads, self.d_values, width = c.memory_rank, c.memory_heads, c.d_values, c.width
        self.project = nn.Linear(c.d_features, width, bias=False)
        self.reader = nn.ModuleList(ReaderBlock(width, c.n_heads, c.norm_eps) for _ in range(c.memory_blocks))
        self.norm = RMSNorm(width, eps=c.norm_eps)
        self.query = nn.Linear(width, self.n_heads * _HEAD_DIM, bias=False)
        self.key = nn.Linear(width, self.n_heads * _HEAD_DIM, bias=False)
        self.gate = nn.Linear(width, len(_GATES))
        self.place = nn.Linear(width, N_PLACES)
        self.place_keys = nn.Parameter(torch.randn(n_modules, N_PLACES, d_in) / d_in**0.5)
        self.n_keys = 2 + self.n_heads  # the token before, those attended to (the end as the last of them), the place
        self.strength = nn.Linear(width, n_modules * self.n_keys, bias=False)
        self.strength_bias = nn.Parameter(torch.zeros(n_modules, self.n_keys))
        self.log_ridge = nn.Parameter(torch.full((n_modules,), math.log(_START_RIDGE) / _STRENGTH_RATE))
        self.scale = nn.Parameter(torch.zeros(n_modules))
        self.stop_value = nn.Parameter(torch.zeros(c.d_values))
        self.key_mean = nn.Parameter(torch.zeros(n_modules, d_in))
        self.key_metric = nn.Parameter(torch.eye(d_in).repeat(n_modules, 1, 1))
        # Of what enters at the end of a sentence to what enters at the end of its question, by way of a few directions.
        self.end_mean = nn.Parameter(torch.zeros(n_modules, d_in))
        self.from_end = nn.Parameter(torch.randn(n_modules, d_in, c.memory_question_rank) / d_in**0.5)
        self.to_question = nn.Parameter(torch.randn(n_modules, c.memory_question_rank, d_in) / d_in**0.5)
        self.register_buffer("key_std", torch.ones(n_modules, d_in))
        nn.init.zeros_(self.strength.weight)
        nn.init.constant_(self.gate.bias, _START_GATE)

    @torch.no_grad()
    def set_units(self, entering: Tensor, at_places: Tensor, stop_value: Tensor) -> None:
        """Take the units of the keys from real text.

        Args:
            entering: what enters the modules [modules, tokens, in].
            at_places: its mean at each place of an answer [modules, N_PLACES, in].
            stop_value: what makes the base end its turn [d_values].
        """
        std = entering.std(1)
        self.key_mean.copy_(entering.mean(1))
        self.key_std.copy_(std.clamp_min(std.mean() * 1e-2))
        standard = (entering - self.key_mean[:, None]) / self.key_std[:, None]
        variances, axes = torch.linalg.eigh(standard.transpose(1, 2) @ standard / standard.shape[1])
        self.key_metric.copy_((axes / (variances + _RIDGE)[:, None]) @ axes.transpose(1, 2))
        places = (at_places - at_places.mean(1, keepdim=True)) / self.key_std[:, None]
        self.place_keys.copy_(functional.normalize(places @ self.key_metric, dim=-1))
        self.stop_value.copy_(stop_value)

    @torch.no_grad()
    def set_question_map(self, at_ends: Tensor, at_answers: Tensor, at_places: Tensor) -> None:
        """Fit, in closed form, what maps the end of a sentence to its question: their canonical correlations.

        Call it after `set_units`.

        Args:
            at_ends: what enters at the ends of m sentences [modules, m, in].
            at_answers: what enters where the answer to each is to begin, or to go on [modules, m, in].
            at_places: its mean at each place of an answer [modules, N_PLACES, in].
        """
        self.end_mean.copy_(at_ends.mean(1))
        places = torch.linalg.qr((at_places / self.key_std[:, None]).transpose(1, 2)).Q  # [modules, in, N_PLACES]
        for module, (ends, answers) in enumerate(zip(at_ends, at_answers, strict=True)):
            x, y = ((side - side.mean(0)) / self.key_std[module] for side in (ends, answers))
            from_x, to_y = cca_map(x, y, self.from_end.shape[-1], _RIDGE)
            # What all answers share at a place is no evidence: keys are blind to it.
            to_y -= (to_y @ places[module]) @ places[module].T
            # Keys have unit length, so the sides' sizes are free: such that Adam's steps are small beside them.
            self.from_end[module] = from_x * (_MAP_STD / from_x.std())
            self.to_question[module] = to_y * (_MAP_STD / to_y.std())

    @torch.no_grad()
    def take_modules(self, other: AssociativeMemory, at: Sequence[int]) -> None:
        """Take over a smaller memory, the i-th of whose modules is the at[i]-th here. The others say nothing while their `scale` is zero."""
        theirs = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for name, mine in (*self.named_parameters(), *self.named_buffers()):
            if mine.shape == theirs[name].shape:
                mine.copy_(theirs[name])
            else:  # a part for each module
                mine.view(len(self.scale), -1)[list(at)] = theirs[name].view(len(at), -1)

    def _looked_up(self, looks: Tensor, entering: Tensor) -> list[Tensor]:
        """What entered at the tokens that are looked at, as keys, not yet of length 1.

        Args:
            looks: weights [n, ways, r, t]: the token before, the heads but END, END.
            entering: [n, modules, t, in].

        Returns:
            for each way, [n, modules, r, in].
        """
        dtype = torch.bfloat16 if torch.is_autocast_enabled(looks.device.type) else torch.float32
        # Pooled first: r rows for each way are fewer than t, and everything after is linear.
        pooled = looks.to(dtype).flatten(1, 2)[:, None] @ entering.to(dtype)
        pooled = pooled.unflatten(2, looks.shape[1:3])  # [n, modules, ways, r, in]
        held = looks.sum(-1)[:, None, ..., None]  # 1, or 0 where there is nothing to look at
        common = functional.normalize(self.key_mean / self.key_std, dim=-1)[:, :, None]
        metric = self.key_metric - (self.key_metric @ common) @ common.mT  # what all inputs share opens nothing
        metric = (metric / self.key_std[:, :, None]).to(dtype)
        alike = pooled[:, :, :-1] - (held[:, :, :-1] * self.key_mean[:, None, None]).to(dtype)
        alike = per_layer(alike.flatten(2, 3), metric).unflatten(2, alike.shape[2:4])
        ends = pooled[:, :, -1] - (held[:, :, -1] * self.end_mean[:, None]).to(dtype)
        ends = per_layer(ends, (self.from_end / self.key_std[:, :, None]).to(dtype))
        return [*alike.unbind(2), per_layer(ends, self.to_question.to(dtype))]

    def _apart(self, a: Tensor, gates: Tensor) -> Tensor:
        """Keys [n, modules, r, in] -> keys that answer less to one another, the more the tokens' gates [n, r] are open.

        Where many tokens say the same (digits), what their keys have in common would add up to more than the right one's
        match. Least squares takes it away: the optimal linear associative memory (Kohonen and Ruohonen, 1973), with a ridge
        since what is met at a question is not the key itself. A key without others like it stays as it is.
        """
        ridge = (_STRENGTH_RATE * self.log_ridge).exp()[:, None, None]  # [modules, 1, 1]
        with torch.autocast(a.device.type, enabled=False):
            length = torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp_min(1e-12)
            units = a / length
            alike = (units @ units.mT) * (gates[:, :, None] * gates[:, None, :])[:, None]  # [n, modules, r, r]
            one = torch.eye(a.shape[2], device=a.device)
            return length * (torch.linalg.inv(alike * (1 - one) + (1 + ridge) * one) @ ((1 + ridge) * units))

    def read(self, standard: Tensor, mask: Tensor) -> tuple[Tensor, MemoryWrites]:
        """Standardised features [n, t, d], mask [n, t] -> tokens that know their sentence [n, t, w], and what to write."""
        x = self.project(standard)
        for block in self.reader:
            x = block(x, mask)
        x = self.norm(x).float()
        with torch.autocast(x.device.type, enabled=False):  # choosing among tokens takes more than bf16's two digits
            n, t, _ = x.shape
            q, k = (rotate(side(x).view(n, t, self.n_heads, -1).transpose(1, 2)) for side in (self.query, self.key))
            scores = q @ k.transpose(2, 3) / _HEAD_DIM**0.5  # [n, heads, t, t]
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
            gates = self.gate(x).masked_fill(~mask[..., None], torch.finfo(x.dtype).min)
            places = self.place(x)
        return x, MemoryWrites(scores, gates, places)

    def forward(self, standard: Tensor, features: Features, mask: Tensor) -> tuple[Tensor, Tensor, MemoryWrites]:
        """
        Args:
            standard: the features' states in the hypernetwork's units [n, t, d].
            features: with `starts` and `keys`.
            mask: [n, t], true where a token is real.
        """
        if features.keys is None or features.starts is None:
            raise ValueError("an associative memory needs features with keys and starts")
        x, writes = self.read(standard, mask)
        n, t, _ = x.shape
        rank = min(self.rank, t)
        gates = writes.gate_logits.sigmoid()
        chosen = gates.sum(-1).topk(rank, dim=1).indices.sort(dim=1).values  # [n, r], as they stand in the chunk

        def pick(rows: Tensor) -> Tensor:  # [n, t, d] -> [n, r, d]
            return rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[-1]))

        say, begin, stop = pick(gates).unbind(-1)  # [n, r]
        values = features.states[..., -self.d_values :]
        stop_value = functional.normalize(self.stop_value, dim=0)
        b = say[..., None] * pick(values) + begin[..., None] * pick(features.starts) + stop[..., None] * stop_value
        tokens = torch.arange(t, device=x.device)
        before = (tokens == (chosen[..., None] - 1)).float()  # [n, r, t]: zero for the first token
        looks = writes.pointer_scores.softmax(-1)  # [n, heads, t, t]
        looks = looks.gather(2, chosen[:, None, :, None].expand(-1, self.n_heads, -1, t))
        looks = torch.cat([before[:, None], looks[:, :END], looks[:, END + 1 :], looks[:, END, None]], dim=1)
        strength = self.strength(pick(x)).view(n, rank, -1, self.n_keys).float()
        strength = 0.5 + _STRENGTH_RATE * self.strength_bias + strength  # [n, r, modules, keys]
        strength = strength.permute(3, 0, 2, 1)[..., None]  # [keys, n, modules, r, 1]
        in_place = pick(writes.place_logits).softmax(-1)  # [n, r, places]
        a = strength[-1] * (in_place[:, None] @ functional.normalize(self.place_keys, dim=-1))  # [n, modules, r, in]
        for found, how_much in zip(self._looked_up(looks, features.keys), strength[:-1], strict=True):
            length = torch.linalg.vector_norm(found, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
            a = torch.addcmul(a, found, how_much / length)
        a = self._apart(a, gates.amax(-1).gather(1, chosen))
        a = a / (self.key_std[:, None] * a.shape[-1] ** 0.5)
        if rank < self.rank:
            a, b = (functional.pad(side, (0, 0, 0, self.rank - rank)) for side in (a, b))
        weights = self.scale.detach().abs() + 1e-9  # all alike at the start
        writes = replace(writes, tokens=chosen, weights=weights / weights.sum())
        return a, b[:, None] * (_SCALE_RATE * self.scale)[:, None, None], writes
