"""The reader: it finds, for a question, the units of a document that answer it, or that nothing there does.

It works on the base's own hidden states, in two steps:

    document tokens -> vectors of `width` numbers, kept in a byte each      (once, when the document is learned)
    question tokens -> vectors with weights; a unit's score is the sum over the question's tokens of the best match
        among the unit's tokens (late interaction: ColBERT, arXiv 2004.12832, section 3.3), plus its BM25
    the question and the best units together -> a small transformer -> for each token whether the answer begins there,
        for "nowhere in the document" and for "not meant for a document" (as in SQuAD 2.0 readers: arXiv 1810.04805)

The second step adds to what the first one says of each unit. It sees of each word of the question whether the document
and its best units hold it (as in DrQA: arXiv 1704.00051, section 3.2). Each word also adds its own evidence to both
verdicts, from how rare it is and where it stands: attention takes means, and the absence of a single rare word must
count as much in a long question.

A unit's probability is the sum of its tokens'. The network lies in a file of its own beside the hypernetwork,
`reader.safetensors`, since it can be trained anew without making adapters' factors invalid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from loracast.errors import HypernetworkError
from loracast.files import frozen, value_faults, write_with

READER_FILE = "reader.safetensors"
_LEVELS, _CLIP = 127.0, 4.0  # of a kept number, whose vector has a mean square of 1
_N_WORD = 4  # what the evidence of a word comes from
_COMMON = 4.0  # nats: a token that is commoner than one in 55 (e to this power) tells nothing by its absence
_NEVER = -1e4  # finite, so that the gradient of a unit without tokens is a number


@dataclass(frozen=True)
class ReaderConfig:
    """The shape of a reader."""

    d_state: int
    """Width of the base."""
    vocabulary: int
    """Tokens that the base knows."""
    layer: int = 14
    """The block after which states are read."""
    prefix: tuple[int, ...] = ()
    """Token ids read before a question and a chunk."""
    width: int = 128
    """Numbers that are kept for a token of a document."""
    inner: int = 192
    """Width of the second step's transformer."""
    n_blocks: int = 2
    n_heads: int = 6
    dropout: float = 0.1
    """Of the inputs of both steps, in training."""
    n_best: int = 5
    """Units that the second step reads."""
    most_tokens: int = 64
    """Tokens of a unit, and of a question, that the second step reads; a unit's later ones are left out, and a
    question's earlier ones."""


class Question(NamedTuple):
    """A question as the reader sees it."""

    vectors: Tensor
    """Of unit length, for late interaction [m, width]."""
    weights: Tensor
    """Of each token [m], with the sum 1."""


class Places(NamedTuple):
    """Logits of where the answer is."""

    begins: Tensor
    """That the answer begins with this token of the units that were read [questions, t]; very low at padding."""
    units: Tensor
    """That the answer is in a unit [questions, k]: the tokens' together."""
    nowhere: Tensor
    """That it stands nowhere in the document [questions]."""
    foreign: Tensor
    """That the question is meant for no document [questions]."""
    absent: Tensor
    """What the question's words alone say for both of these: part of their logits [questions]."""

    def all(self) -> Tensor:
        """Logits of every unit, then of nowhere and foreign [questions, k + 2]."""
        return torch.cat([self.units, self.nowhere[:, None], self.foreign[:, None]], 1)


@dataclass(frozen=True)
class Found:
    """What the reader finds for one question in one document."""

    units: tuple[int, ...]
    """The units that the second step read, in the document's order."""
    of_units: tuple[float, ...]
    """The probability of each that it answers."""
    nowhere: float
    """The probability that nothing in the document answers."""
    foreign: float
    """The probability that the question is meant for no document."""
    begins: tuple[tuple[int, float], ...]
    """The tokens of the document with which the answer may begin, each with its probability, the likeliest first."""
    margin: float
    """How much likelier "nowhere" is than all units, as a difference of logits."""

    @property
    def is_foreign(self) -> bool:
        """Whether the question is meant for no document, such as a greeting."""
        return self.foreign > max(self.nowhere, sum(self.of_units))


class Reader(nn.Module):
    """The network of both steps; it knows shapes, never a base's weights."""

    mean: Tensor
    std: Tensor
    rarity: Tensor
    """Of each token, by its frequency in documents [vocabulary]: 0 and less for the commonest, of no weight."""
    refusing: Tensor
    """From which `Found.margin` on a question is refused."""
    id: str = ""
    """The hash of its file; "" until it is read from one."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.config = c = config
        self.register_buffer("mean", torch.zeros(2 * c.d_state))
        self.register_buffer("std", torch.ones(2 * c.d_state))
        self.register_buffer("rarity", torch.zeros(c.vocabulary))
        self.register_buffer("refusing", torch.zeros(()))
        self.text = nn.Linear(2 * c.d_state, c.width)
        self.asked = nn.Linear(2 * c.d_state, c.width)
        self.weigh = nn.Linear(2 * c.d_state, 1)
        self.of_score = nn.Parameter(torch.tensor([12.0, 4.0]))  # of late interaction and of BM25
        self.asked_inner = nn.Linear(2 * c.d_state, c.inner)
        self.text_inner = nn.Linear(c.width, c.inner)
        self.score_inner = nn.Linear(2, c.inner)
        self.match_inner = nn.Linear(2 * (c.n_best + 1) + _N_WORD, c.inner, bias=False)
        self.verdicts = nn.Parameter(torch.randn(2, c.inner) * 0.02)
        self.at = nn.Parameter(torch.randn(c.most_tokens, c.inner) * 0.02)  # in a unit or a question
        self.order = nn.Parameter(torch.randn(c.n_best, c.inner) * 0.02)  # of the units
        block = nn.TransformerEncoderLayer(
            c.inner, c.n_heads, 4 * c.inner, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, c.n_blocks, nn.LayerNorm(c.inner), enable_nested_tensor=False)
        self.evidence = nn.Sequential(  # of each question token, for both verdicts
            nn.Linear(_N_WORD, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 1)
        )
        self.begins = nn.Linear(c.inner, 1)
        self.says = nn.Linear(c.inner, 1)

    # ---- what is kept of a document, and what is made of a question

    def standard(self, read: Tensor) -> Tensor:
        """States and input embeddings of tokens, side by side, in the reader's units [..., 2 * d_state]."""
        return (read.float() - self.mean) / self.std

    def measure(self, read: Tensor, ids: Tensor) -> None:
        """Take means, deviations and rarity from what is read of tokens [t, 2 * d_state], and their ids."""
        counts = torch.bincount(ids, minlength=self.config.vocabulary) + 1
        self.rarity.copy_((len(ids) / counts).log() / _COMMON - 1)
        self.mean.copy_(read.float().mean(0))
        self.std.copy_(read.float().std(0) + 1e-3)

    def vectors(self, standard: Tensor) -> Tensor:
        """Standardised document tokens -> their vectors, of a mean square of 1 [..., width]."""
        found = self.text(functional.dropout(standard, self.config.dropout, self.training))
        return found * found.square().mean(-1, keepdim=True).add(1e-6).rsqrt()

    def kept(self, vectors: Tensor) -> Tensor:
        """Vectors as they are kept, in bytes [..., width]."""
        return (vectors.clamp(-_CLIP, _CLIP) * (_LEVELS / _CLIP)).round().to(torch.int8)

    def unpacked(self, kept: Tensor) -> Tensor:
        """Kept bytes as vectors [..., width]."""
        return kept.float() * (_CLIP / _LEVELS)

    def question(self, standard: Tensor, mask: Tensor | None = None) -> Question:
        """Standardised question tokens [..., m, 2 * d_state], where the mask is true -> the question."""
        weights = self.weigh(standard)[..., 0]
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf)
        kept = functional.dropout(standard, self.config.dropout, self.training)
        return Question(functional.normalize(self.asked(kept), dim=-1), weights.softmax(-1))

    # ---- step 1

    def late(self, question: Question, text: Tensor, units: Tensor, n_units: int) -> tuple[Tensor, Tensor]:
        """Late interaction of questions with the units of one document [questions, n_units], and what it sums up:
        the cosine of each question token with the most similar token of each unit [questions, m, n_units].

        Args:
            question: of each, [questions, m, ...].
            text: the vectors of the document's tokens [t, width].
            units: the unit of each token [t].
        """
        products = question.vectors @ text.T * text.shape[-1] ** -0.5  # cosines [questions, m, t]
        best = products.new_full((*products.shape[:2], n_units), -1.0)
        best = best.scatter_reduce(2, units.expand_as(products), products, "amax", include_self=False)
        return (best * question.weights[..., None]).sum(1), best

    def first(self, late: Tensor, bm25: Tensor) -> Tensor:
        """Logits of units after the first step; BM25 is 1 for the best unit, or 0 everywhere."""
        return self.of_score[0] * late + self.of_score[1] * bm25

    # ---- step 2

    def matched(self, ids: Tensor, cosines: Tensor, held: Tensor, best: Tensor) -> Tensor:
        """How well the tokens of a question are matched by the document and its units [m, 2 * (n_best + 1) + 4].

        The last four: how rare a token is, and whether its word stands in the document, in the chunk and in the unit
        that hold most of the question.

        Args:
            ids: of the tokens [m].
            cosines: of each token with each unit, as of `late` [m, n_units].
            held: 1 where a unit holds the token's word, a half where only its chunk does, then 1 where the document
                does [m, n_units + 1].
            best: the units that the second step reads [k].
        """
        lacking, of_units, rarity = self.config.n_best - len(best), held[:, :-1], self.rarity[ids]
        held_by = [(of_units > 0).float(), (of_units == 1).float()]
        most = [one[:, (rarity.clamp_min(0) @ one).argmax()] for one in held_by]
        every = [cosines.amax(1, keepdim=True), functional.pad(cosines[:, best], (0, lacking)), held[:, -1:],
                 functional.pad(held[:, best], (0, lacking)), torch.stack([rarity, held[:, -1], *most], 1)]  # fmt: skip
        return torch.cat(every, 1)[-self.config.most_tokens :]

    def places(
        self, asked: Tensor, asked_mask: Tensor, matched: Tensor, text: Tensor, units: Tensor, scores: Tensor
    ) -> Places:
        """Read questions with the best units of their documents, in the document's order.

        Args:
            asked: standardised question tokens [questions, m, 2 * d_state].
            asked_mask: true where a token is real [questions, m].
            matched: how well each token is matched in the document and in each unit, as of `matched`
                [questions, m, 2 * (n_best + 1) + 4].
            text: the vectors of the units' tokens, one unit after the other [questions, t, width].
            units: the unit of each token, from 0 to k - 1, and k for padding [questions, t].
            scores: late interaction and BM25 of each unit [questions, k, 2].
        """
        n, k, _ = scores.shape
        m, is_real = asked.shape[1], units < k
        of_units = functional.pad(self.score_inner(scores) + self.order[:k], (0, 0, 0, 1))  # [questions, k + 1, inner]
        of_tokens = of_units.gather(1, units[..., None].expand(-1, -1, of_units.shape[-1]))
        read = self.text_inner(text) + of_tokens + self.at[_within(units).clamp_max(len(self.at) - 1)]
        kept = functional.dropout(asked, self.config.dropout, self.training)
        of_asked = self.asked_inner(kept) + self.match_inner(matched) + self.at[:m]
        absent = self.evidence(matched[..., -_N_WORD:])[..., 0].masked_fill(~asked_mask, 0.0).sum(1).float()
        mask = torch.cat([asked_mask.new_ones(n, 2), asked_mask, is_real], 1)
        out = self.blocks(torch.cat([self.verdicts.expand(n, 2, -1), of_asked, read], 1), src_key_padding_mask=~mask)
        of_each = units[:, None] == torch.arange(k, device=units.device)[:, None]  # [questions, k, t]
        first = self.first(scores[..., 0], scores[..., 1]).masked_fill(~of_each.any(-1), _NEVER).log_softmax(-1)
        first = functional.pad(first, (0, 1)).gather(1, units)  # of each token's unit [questions, t]
        begins = (self.begins(out[:, 2 + m :])[..., 0].float() + first).masked_fill(~is_real, _NEVER)
        says = self.says(out[:, :2])[..., 0].float() + absent[:, None]
        of_units = begins[:, None].expand_as(of_each).masked_fill(~of_each, _NEVER).logsumexp(-1)
        return Places(begins, of_units, says[:, 0], says[:, 1], absent)

    # ---- both steps

    @torch.inference_mode()
    def find(self, question: Tensor, ids: Tensor, text: Tensor, units: Tensor, bm25: Tensor, held: Tensor) -> Found:
        """Look for the answer to one question in one document.

        Args:
            question: its standardised tokens [m, 2 * d_state].
            ids: of these [m].
            text: the document's vectors [t, width].
            units: the unit of each of its tokens, in order [t].
            bm25: of each unit, 1 for the best [units].
            held: of each of the question's tokens, as of `matched` [m, units + 1].
        """
        c = self.config
        late, cosines = (of_one[0] for of_one in self.late(self.question(question[None]), text, units, len(bm25)))
        first = self.first(late, bm25)
        best = first.topk(min(c.n_best, len(first))).indices.sort().values
        rows, of_rows = self.rows_of(best, units)
        scores = torch.stack([late, bm25], -1)[best]
        asked = question[None, -c.most_tokens :]
        matched, mask = self.matched(ids, cosines, held, best)[None], asked.new_ones(1, asked.shape[1]) > 0
        places = self.places(asked, mask, matched, text[rows][None], of_rows[None], scores[None])
        logits = places.all()[0]
        probabilities = logits.softmax(0).tolist()
        begins = (places.begins[0] - logits.logsumexp(0)).exp()
        order = begins.argsort(descending=True, stable=True)
        return Found(
            units=tuple(best.tolist()),
            of_units=tuple(probabilities[:-2]),
            nowhere=probabilities[-2],
            foreign=probabilities[-1],
            begins=tuple(zip(rows[order].tolist(), begins[order].tolist(), strict=True)),
            margin=(places.nowhere[0] - places.units[0].logsumexp(0)).item(),
        )

    def rows_of(self, best: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of some units, ascending, as the second step reads them, and the place in `best` of each one's."""
        rows = torch.cat([(units == unit).nonzero()[:, 0][: self.config.most_tokens] for unit in best])
        return rows, torch.searchsorted(best, units[rows])

    # ---- the file

    def save(self, path: Path, provenance: Mapping[str, Any]) -> None:
        """Write it to a file, its numbers in fp16; `provenance` says how it was made."""
        from safetensors.torch import save_file

        tensors = {name: value.detach().cpu().half().contiguous() for name, value in self.state_dict().items()}
        about = {"config": json.dumps(asdict(self.config)), "provenance": json.dumps(dict(provenance))}
        write_with(path, lambda part: save_file(tensors, part, metadata=about))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a reader from its file, in fp32, to be used. Raises HypernetworkError where the file is damaged."""
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {})["config"])
                if faults := value_faults(ReaderConfig, config):
                    raise HypernetworkError(f"{path} holds no reader: {'; '.join(faults)}")
                reader = cls(ReaderConfig(**{key: frozen(value) for key, value in config.items()}))
                reader.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
            reader.id = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        except HypernetworkError:
            raise
        except Exception as error:  # a damaged file makes these readers raise nearly anything
            raise HypernetworkError(f"{path} holds no reader ({error}): download or train it again") from error
        return reader.eval().requires_grad_(False)


def _within(units: Tensor) -> Tensor:
    """The place of each token in its unit, from the units of tokens that stand together [questions, t]."""
    places = torch.arange(units.shape[1], device=units.device).expand_as(units)
    is_first = functional.pad(units[:, 1:] != units[:, :-1], (1, 0), value=True)
    place = places - torch.where(is_first, places, 0).cummax(1).values
    return place
