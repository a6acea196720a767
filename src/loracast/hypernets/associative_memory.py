"""The associative memory: stores tokens of a chunk in the weights of a few modules, to be retrieved at a question.

A linear map that adds value_t <key_t, x> over the tokens t is a LoRA with A rows key_t and B columns value_t (fast
weights: Schlag et al., arXiv 2102.11174). A value is the direction in which a module's output makes the base generate
the token. A key is a weighted sum of parts, each of which matches the module's input in a different situation:

- the input at the token before, so that an answer continues as the chunk did;
- the input at tokens that pointer heads attend to, such as the subject of the sentence: some heads of the base carry
  the subject of a question to the position of the answer, where it looks much as it did in the chunk;
- the input at the end of the sentence, where the base has read all of it, through a linear map that predicts the input
  at the end of a question about such a sentence;
- where `memory_near_tokens` is set, the mean input at the token and those that follow it, through another such map: it
  tells the values of one sentence apart;
- the mean input at the first, second, third ... token of any answer: the token's position in its value.

Where `memory_verdicts` is set, the end of a sentence that states a rule ("Pets are welcome.") is written, too: its
value turns an answer from No to Yes, or the other way round, and its key is that of an answer's first token.

A learned metric, at first the whitening of the inputs, makes keys of different subjects nearly orthogonal; least
squares then removes what the keys of a chunk still have in common. That lets many facts, and many chunks, coexist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.hypernets.config import DocToLoRAConfig
from loracast.hypernets.encoders import Features
from loracast.hypernets.perceiver import ReaderBlock, RMSNorm, per_layer, rotate

_GATES = ("inside", "begin", "after")  # in the order of lab/data/facts.py
OWNER, END = range(2)
"""Pointer heads that span supervision can train: to the last token of the owner's name, and of the sentence."""
N_PLACES = 8
"""Places in an answer that are distinguished; the last one stands for all that follow."""
_HEAD_DIM = 32
_START_GATE = -2.0
START_STRENGTH = 0.5
_FEWEST_POINTING = 3.0  # tokens of a sentence whose end may be written as a verdict
_START_RIDGE = 2.0
# Adam moves every number by about the learning rate; what must move much further is stored divided by these factors.
_SCALE_RATE = 400.0
STRENGTH_RATE = 10.0


@dataclass(frozen=True)
class MemoryWrites:
    """What a memory decided about the tokens of n chunks; the memory losses compare it with span supervision."""

    pointer_scores: Tensor
    """[n, heads, t, t]: how much each token points to each other one, before the softmax."""
    gate_logits: Tensor
    """[n, t, 3]: write gates INSIDE, BEGIN, AFTER (lab/data/facts.py)."""
    place_logits: Tensor
    """[n, t, N_PLACES]: the place in an answer that a token takes."""
    tokens: Tensor | None = None
    """[n, r]: the tokens that are written, in the order of the rows; None before that is decided."""
    weights: Tensor | None = None
    """[modules]: share of each module in what all of them write."""


@dataclass(frozen=True)
class _Verdicts:
    """What the sentences that end at each token of n chunks say of the rules that they state."""

    said: Tensor
    """[n, t]: from 1, the rule holds, to -1, it does not; 0 where no sentence ends or it states no rule."""
    share: Tensor
    """[n, t]: how sure it is that a rule is stated, 0 to 1."""
    sentences: Tensor
    """[n, t, t]: the share of each other token in the sentence that ends at a token."""


class AssociativeMemory(nn.Module):
    """Features of n chunks -> A [n, modules, r, in] and B rows [n, r, out], one row for each token written.

    A token's row of B is the same in all modules but for the module's factor (`scales`).

    The r tokens whose gates are most open are written. It starts as an exact no-op, because `scale` starts at zero.
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
        self.n_near, self.gate_power = c.memory_near_tokens, c.memory_gate_power
        # The token before, those pointed to (the end last), those near (if any), the place.
        self.n_keys = 2 + self.n_heads + (self.n_near > 0)
        self.strength = nn.Linear(width, n_modules * self.n_keys, bias=False)
        self.strength_bias = nn.Parameter(torch.zeros(n_modules, self.n_keys))
        self.log_ridge = nn.Parameter(torch.full((n_modules,), math.log(_START_RIDGE) / STRENGTH_RATE))
        self.scale = nn.Parameter(torch.zeros(n_modules))
        self.stop_value = nn.Parameter(torch.zeros(c.d_values))
        self.key_mean = nn.Parameter(torch.zeros(n_modules, d_in))
        self.key_metric = nn.Parameter(torch.eye(d_in).repeat(n_modules, 1, 1))
        # Predicts the input at the end of a question from the input at the end of its sentence, at low rank.
        self.end_mean = nn.Parameter(torch.zeros(n_modules, d_in))
        self.from_end = nn.Parameter(torch.randn(n_modules, d_in, c.memory_question_rank) / d_in**0.5)
        self.to_question = nn.Parameter(torch.randn(n_modules, c.memory_question_rank, d_in) / d_in**0.5)
        if self.n_near:  # the same from the mean input at a token and those that follow it
            self.near_mean = nn.Parameter(torch.zeros(n_modules, d_in))
            self.from_near = nn.Parameter(torch.randn(n_modules, d_in, c.memory_question_rank) / d_in**0.5)
            self.near_to_question = nn.Parameter(torch.randn(n_modules, c.memory_question_rank, d_in) / d_in**0.5)
        self.has_verdicts = c.memory_verdicts
        if self.has_verdicts:  # whether the sentence that ends at a token says yes, and whether it says no
            self.verdict = nn.Linear(c.d_features, 2)
            self.verdict_value = nn.Parameter(torch.zeros(c.d_values))  # from No to Yes
        self.register_buffer("key_std", torch.ones(n_modules, d_in))
        nn.init.zeros_(self.strength.weight)
        nn.init.constant_(self.gate.bias, _START_GATE)

    def _pointed_keys(self, pointers: Tensor, inputs: Tensor) -> list[Tensor]:
        """Key parts from the inputs at the tokens that are pointed to, not yet of length 1.

        Args:
            pointers: weights [n, ways, r, t]: the token before, the heads but END, END, near tokens if there are any.
            inputs: of the memory's modules [n, modules, t, in].

        Returns:
            for each way, [n, modules, r, in].
        """
        dtype = torch.bfloat16 if torch.is_autocast_enabled(pointers.device.type) else torch.float32
        # Pooled first: r rows for each way are fewer than t, and everything after is linear.
        pooled = pointers.to(dtype).flatten(1, 2)[:, None] @ inputs.to(dtype)
        pooled = pooled.unflatten(2, pointers.shape[1:3])  # [n, modules, ways, r, in]
        total = pointers.sum(-1)[:, None, ..., None]  # 1, or 0 for the first token, which has none before it
        common = functional.normalize(self.key_mean / self.key_std, dim=-1)[:, :, None]
        metric = self.key_metric - (self.key_metric @ common) @ common.mT  # what all inputs share tells nothing apart
        metric = (metric / self.key_std[:, :, None]).to(dtype)
        n_ways = self.n_heads  # mapped by the metric: the token before, and those of all heads but END
        tokens = pooled[:, :, :n_ways] - (total[:, :, :n_ways] * self.key_mean[:, None, None]).to(dtype)
        tokens = per_layer(tokens.flatten(2, 3), metric).unflatten(2, tokens.shape[2:4])
        maps = [(self.end_mean, self.from_end, self.to_question)]
        if self.n_near:
            maps.append((self.near_mean, self.from_near, self.near_to_question))
        parts = list(tokens.unbind(2))
        for way, (mean, from_input, to_question) in enumerate(maps, len(parts)):
            part = pooled[:, :, way] - (total[:, :, way] * mean[:, None]).to(dtype)
            part = per_layer(part, (from_input / self.key_std[:, :, None]).to(dtype))
            parts.append(per_layer(part, to_question.to(dtype)))
        return parts

    def _decorrelate(self, a: Tensor, gates: Tensor) -> Tensor:
        """Keys [n, modules, r, in], decorrelated within each chunk, the more the tokens' gates [n, r] are open.

        Where many keys are alike (those of digits), what they have in common would add up to more than the match of the
        right one. Least squares removes it: the optimal linear associative memory (Kohonen and Ruohonen, 1973), with a
        ridge, since a question never meets a key exactly. A key that is orthogonal to all others does not change.
        """
        ridge = (STRENGTH_RATE * self.log_ridge).exp()[:, None, None]  # [modules, 1, 1]
        with torch.autocast(a.device.type, enabled=False):
            length = torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp_min(1e-12)
            units = a / length
            gram = (units @ units.mT) * (gates[:, :, None] * gates[:, None, :])[:, None]  # [n, modules, r, r]
            one = torch.eye(a.shape[2], device=a.device)
            # Not by LU: MKL's, of several matrices, fails after a call of torch.set_num_threads.
            root = torch.linalg.cholesky(gram * (1 - one) + (1 + ridge) * one)
            return length * torch.cholesky_solve((1 + ridge) * units, root)

    def read(self, standard: Tensor, mask: Tensor) -> tuple[Tensor, MemoryWrites]:
        """Standardised features [n, t, d], mask [n, t] -> contextual token states [n, t, w], and what to write."""
        x = self.project(standard)
        for block in self.reader:
            x = block(x, mask)
        x = self.norm(x).float()
        with torch.autocast(x.device.type, enabled=False):  # choosing among tokens needs more than bf16's precision
            n, t, _ = x.shape
            q, k = (rotate(side(x).view(n, t, self.n_heads, -1).transpose(1, 2)) for side in (self.query, self.key))
            scores = q @ k.transpose(2, 3) / _HEAD_DIM**0.5  # [n, heads, t, t]
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
            gates = self.gate(x).masked_fill(~mask[..., None], torch.finfo(x.dtype).min)
            places = self.place(x)
        return x, MemoryWrites(scores, gates, places)

    def sentence_means(self, standard: Tensor, mask: Tensor, writes: MemoryWrites) -> tuple[Tensor, Tensor, Tensor]:
        """Of the sentence that ends at each token: its mean state [n, t, d], all tokens' shares in it, its length.

        A sentence is the tokens that point to its end; the shares are [n, t, t], the lengths [n, t].
        """
        pointing = writes.pointer_scores[:, END].softmax(-1) * mask[..., None]  # [n, from, end]
        lengths = pointing.sum(1)
        shares = (pointing / lengths.clamp_min(1e-6)[:, None]).mT
        return shares @ standard.float(), shares, lengths

    def is_end(self, mask: Tensor, lengths: Tensor) -> Tensor:
        """Whether a sentence that is long enough to state a rule ends at each token [n, t]."""
        return mask & (lengths > _FEWEST_POINTING)

    def _verdicts(self, standard: Tensor, mask: Tensor, writes: MemoryWrites, gates: Tensor) -> _Verdicts:
        """What each sentence says, but where a value is written: `gates` [n, t] are open there."""
        with torch.autocast(standard.device.type, enabled=False):
            means, shares, lengths = self.sentence_means(standard, mask, writes)
            free = self.is_end(mask, lengths) * (1 - gates)  # [n, t]
            yes, no = self.verdict(means).sigmoid().unbind(-1)
            return _Verdicts((yes - no) * free, (yes + no).clamp_max(1) * free, shares)

    def forward(self, standard: Tensor, features: Features, mask: Tensor) -> tuple[Tensor, Tensor, MemoryWrites]:
        """Choose and write the tokens of n chunks: A, B rows without `scales`, and the decisions behind them.

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
        n_open, most_open = gates.sum(-1), gates.amax(-1)  # [n, t]
        verdicts = self._verdicts(standard, mask, writes, most_open) if self.has_verdicts else None
        if verdicts is not None:
            n_open, most_open = n_open + verdicts.share, torch.maximum(most_open, verdicts.share)
        chosen = n_open.topk(rank, dim=1).indices.sort(dim=1).values  # [n, r], as they stand in the chunk

        def pick(rows: Tensor) -> Tensor:  # [n, t, d] -> [n, r, d]
            return rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[-1]))

        # A closed gate has an infinite gradient below a power of 1.
        lengths = gates if self.gate_power == 1 else gates.clamp_min(1e-12) ** self.gate_power
        inside, begin, after = pick(lengths).unbind(-1)  # [n, r]
        values = features.states[..., -self.d_values :]
        stop_value = functional.normalize(self.stop_value, dim=0)
        b = inside[..., None] * pick(values) + begin[..., None] * pick(features.starts) + after[..., None] * stop_value
        ahead = torch.arange(t, device=x.device) - chosen[..., None]  # [n, r, t]
        before = (ahead == -1).float()  # zero for token 0
        heads = writes.pointer_scores.softmax(-1)  # [n, heads, t, t]
        heads = heads.gather(2, chosen[:, None, :, None].expand(-1, self.n_heads, -1, t))
        end = heads[:, END]
        near = ((ahead >= 0) & (ahead < self.n_near) & mask[:, None]).float()
        near = near / near.sum(-1, keepdim=True).clamp_min(1)
        places = pick(writes.place_logits).softmax(-1)  # [n, r, places]
        if verdicts is not None:  # a verdict has the key of an answer's first token, at its sentence's end
            b = b + pick(verdicts.said[..., None]) * self.verdict_value
            share = pick(verdicts.share[..., None])  # [n, r, 1]
            before = before * (1 - share)
            end = torch.lerp(end, (ahead == 0).float(), share)
            near = torch.lerp(near, pick(verdicts.sentences), share)
            places = torch.lerp(places, functional.one_hot(torch.zeros_like(chosen), N_PLACES).to(places), share)
        pointers = [before[:, None], heads[:, :END], heads[:, END + 1 :], end[:, None]]
        if self.n_near:
            pointers.append(near[:, None])
        strength = self.strength(pick(x)).view(n, rank, -1, self.n_keys).float()
        strength = START_STRENGTH + STRENGTH_RATE * self.strength_bias + strength  # [n, r, modules, keys]
        strength = strength.permute(3, 0, 2, 1)[..., None]  # [keys, n, modules, r, 1]
        a = strength[-1] * (places[:, None] @ functional.normalize(self.place_keys, dim=-1))  # [n, modules, r, in]
        parts = self._pointed_keys(torch.cat(pointers, dim=1), features.keys)
        for part, weight in zip(parts, strength[:-1], strict=True):
            length = torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
            a = torch.addcmul(a, part, weight / length)
        a = self._decorrelate(a, most_open.gather(1, chosen))
        a = a / (self.key_std[:, None] * a.shape[-1] ** 0.5)
        if rank < self.rank:
            a, b = (functional.pad(side, (0, 0, 0, self.rank - rank)) for side in (a, b))
        weights = self.scale.detach().abs() + 1e-9  # equal shares while all scales are zero
        writes = replace(writes, tokens=chosen, weights=weights / weights.sum())
        return a, b, writes

    @property
    def scales(self) -> Tensor:
        """The factor of each module's delta [modules, 1, 1]."""
        return (_SCALE_RATE * self.scale)[:, None, None]
