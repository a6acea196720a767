"""Set a memory's weights before training: from statistics of real text, and from the weights of another memory.

A low-rank head starts from a full one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from loracast.hypernets.associative_memory import START_STRENGTH, STRENGTH_RATE, AssociativeMemory
from loracast.hypernets.perceiver import FactorHead

_NEAR_SHARE = 0.5  # of the strength of the ends' keys, for those of near tokens at first
_FROM_END = {"near_mean": "end_mean", "from_near": "from_end", "near_to_question": "to_question"}
_MAP_STD = 0.1
_RIDGE = 0.3  # of the whitening, in units of the variance of one standardised input number


def cca_map(x: Tensor, y: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """A bilinear score of rank `rank` that is high when x and y belong together: score(x, y) = x @ from_x @ to_y @ y.

    Each pair of canonical directions with correlation c weighs c / (1 - c^2): for Gaussian views this makes the score
    the cross term of the log-likelihood ratio of "same sample" to "independent samples" (Hotelling, "Relations between
    two sets of variates", 1936).

    Args:
        x, y: two views of m samples [m, d], [m, e], each with mean zero.
        rank: directions kept; those beyond min(d, e) are zero.
        ridge: added to both covariances, in units of the mean variance of x and y.

    Returns:
        from_x [d, rank] and to_y [rank, e].
    """
    white_x, white_y = (_inverse_root(side, ridge) for side in (x, y))
    left, correlations, right = torch.linalg.svd(white_x @ (x.T @ y / len(x)) @ white_y)
    n_kept = min(rank, len(correlations))
    weights = correlations[:n_kept].clamp(max=0.97)
    weights = weights / (1 - weights.square())
    from_x, to_y = x.new_zeros(x.shape[1], rank), y.new_zeros(rank, y.shape[1])
    from_x[:, :n_kept] = white_x @ (left[:, :n_kept] * weights.sqrt())
    to_y[:n_kept] = (right[:n_kept] * weights.sqrt()[:, None]) @ white_y
    return from_x, to_y


def _inverse_root(x: Tensor, ridge: float) -> Tensor:
    """(x^T x / m + ridge)^(-1/2), [d, d]."""
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    return (axes / (variances.clamp_min(0) + ridge * variances.mean()).sqrt()) @ axes.T


@torch.no_grad()
def set_units(memory: AssociativeMemory, inputs: Tensor, at_places: Tensor, stop_value: Tensor) -> None:
    """Set mean, deviation and metric of the keys, and the keys of places, from real text.

    Args:
        inputs: of the memory's modules at many tokens [modules, tokens, in].
        at_places: their mean at each place of an answer [modules, N_PLACES, in].
        stop_value: the value of the token that ends an answer [d_values].
    """
    std = inputs.std(1)
    memory.key_mean.copy_(inputs.mean(1))
    memory.key_std.copy_(std.clamp_min(std.mean() * 1e-2))
    standard = (inputs - memory.key_mean[:, None]) / memory.key_std[:, None]
    variances, axes = torch.linalg.eigh(standard.transpose(1, 2) @ standard / standard.shape[1])
    memory.key_metric.copy_((axes / (variances + _RIDGE)[:, None]) @ axes.transpose(1, 2))
    places = (at_places - at_places.mean(1, keepdim=True)) / memory.key_std[:, None]
    memory.place_keys.copy_(functional.normalize(places @ memory.key_metric, dim=-1))
    memory.stop_value.copy_(stop_value)


@torch.no_grad()
def set_question_map(memory: AssociativeMemory, at_ends: Tensor, at_answers: Tensor, at_places: Tensor) -> None:
    """Fit the map from the end of a sentence to its question by canonical correlation; call it after `set_units`.

    That of near tokens, if there are any, starts as the same.

    Args:
        at_ends: inputs at the ends of m sentences [modules, m, in].
        at_answers: inputs at a token of the answer to a question about each [modules, m, in].
        at_places: mean inputs at each place of an answer [modules, N_PLACES, in].
    """
    memory.end_mean.copy_(at_ends.mean(1))
    places = torch.linalg.qr((at_places / memory.key_std[:, None]).transpose(1, 2)).Q  # [modules, in, N_PLACES]
    for module, (ends, answers) in enumerate(zip(at_ends, at_answers, strict=True)):
        x, y = ((side - side.mean(0)) / memory.key_std[module] for side in (ends, answers))
        from_x, to_y = cca_map(x, y, memory.from_end.shape[-1], _RIDGE)
        # What all answers share at a place says nothing about the sentence: project it out.
        to_y -= (to_y @ places[module]) @ places[module].T
        # Keys are normalised later, so the sizes are free: large enough beside Adam's steps.
        memory.from_end[module] = from_x * (_MAP_STD / from_x.std())
        memory.to_question[module] = to_y * (_MAP_STD / to_y.std())
    if memory.n_near:  # no question tells near tokens from ends yet
        for near, end in _FROM_END.items():
            getattr(memory, near).copy_(getattr(memory, end))
        memory.strength_bias[:, -2] = (_NEAR_SHARE - 1) * START_STRENGTH / STRENGTH_RATE


@torch.no_grad()
def take_modules(memory: AssociativeMemory, other: AssociativeMemory, theirs_of: Mapping[int, int]) -> None:
    """Copy a memory's weights; its module theirs_of[i] becomes the i-th here. Others keep a `scale` of zero."""
    theirs = other.state_dict()
    for name, mine in memory.state_dict().items():
        if mine.shape == theirs[name].shape:
            mine.copy_(theirs[name])
        else:  # a tensor with one part for each module
            parts = theirs[name].view(len(other.scale), -1)
            mine.view(len(memory.scale), -1)[list(theirs_of)] = parts[list(theirs_of.values())]


@torch.no_grad()
def take_without_near(memory: AssociativeMemory, other: AssociativeMemory) -> None:
    """Copy a memory without near tokens; their map and strength start as those of the ends of sentences."""
    theirs = other.state_dict()
    kept = [*range(memory.n_keys - 2), memory.n_keys - 1]  # all keys but that of near tokens
    for name, mine in memory.state_dict().items():
        if name in _FROM_END:
            mine.copy_(theirs[_FROM_END[name]])
        elif mine.shape == theirs[name].shape:
            mine.copy_(theirs[name])
        else:  # of the strengths, [modules, keys, width or nothing]
            by_key = mine.view(len(memory.scale), memory.n_keys, -1)
            by_key[:, kept] = theirs[name].view(len(memory.scale), other.n_keys, -1)
            by_key[:, -2] = _NEAR_SHARE * by_key[:, -3]
    memory.strength_bias[:, -2] -= (1 - _NEAR_SHARE) * START_STRENGTH / STRENGTH_RATE


@torch.no_grad()
def take_low_rank(head: FactorHead, other: FactorHead) -> None:
    """Initialise a low-rank head from a full one: the mean of its maps, and corrections by truncated SVD."""
    mean = other.weight.mean(0)
    left, values, right = torch.linalg.svd(other.weight - mean, full_matrices=False)
    n = head.down.shape[-1]
    root = values[:, :n].sqrt()
    head.shared.copy_(mean)
    head.down.copy_(left[:, :, :n] * root[:, None])
    head.up.copy_(root[..., None] * right[:, :n])
    head.scaler_a.copy_(other.scaler_a)
    head.scaler_b.copy_(other.scaler_b)
