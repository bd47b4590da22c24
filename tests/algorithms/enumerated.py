"""A policy small enough that expectations are sums: up to two tokens, of which 0 ends; float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from alignlab.core import Algorithm, Batch, Group, Outputs, Response, aggregate

RESPONSES = [(0,), *product((1, 2), (0, 1, 2))]
"""Seven: of one token and of two, as a limit of two tokens allows."""

ROWS = {(): 0, (1,): 1, (2,): 2}
"""The row of logits after each prefix."""


def log_probs(logits: Tensor, response: Sequence[int]) -> Tensor:
    """Of each token of a response under logits of shape (3, 3), with gradient."""
    return torch.stack([logits[ROWS[tuple(response[:t])]].log_softmax(-1)[v] for t, v in enumerate(response)])


def probabilities(logits: Tensor) -> Tensor:
    """Of the responses, in their order, with gradient."""
    return torch.stack([log_probs(logits, r).sum() for r in RESPONSES]).exp()


def objective(logits: Tensor, ref_logits: Tensor, reward: Sequence[float], beta: float) -> Tensor:
    """E[r] - β·KL(π‖π_ref), a sum over all responses."""
    p = probabilities(logits)
    return (p * (torch.tensor(reward, dtype=p.dtype) - beta * (p / probabilities(ref_logits)).log())).sum()


def drawn(logits: Tensor, ref_logits: Tensor, reward: Sequence[float], indices: Sequence[int]) -> Group:
    """A group of these responses, scored, with the log-probs of the policy as it is and a critic that says 0."""
    made = []
    for i in indices:
        tokens = list(RESPONSES[i])
        old, ref = (log_probs(x, tokens).detach().tolist() for x in (logits, ref_logits))
        known = {"reward": reward[i], "old_logp": old, "ref_logp": ref, "old_value": [0.0] * len(tokens)}
        made.append(Response(tokens, columns=known))
    return Group([1], made)


def gradient(algorithm: Algorithm, groups: list[Group], logits: Tensor) -> Tensor:
    """Of the algorithm's mean loss over the groups, in the logits."""
    batch = Batch(algorithm.prepare(groups))
    logp_T = torch.cat([log_probs(logits, r.token_ids) for r in batch.responses])
    zeros = torch.zeros_like(logp_T)
    loss, _ = algorithm.loss(Outputs(logp_T=logp_T, value_T=zeros, entropy_T=zeros), batch)
    return torch.autograd.grad(aggregate(loss, batch.count(algorithm.unit)), logits)[0]


def expected_gradient(algorithm: Algorithm, make: Callable[[Sequence[int]], Group], logits: Tensor, k: int) -> Tensor:
    """Over all groups of k responses drawn independently from the policy."""
    p = probabilities(logits).detach()
    total = torch.zeros_like(logits)
    for indices in product(range(len(RESPONSES)), repeat=k):
        total += p[list(indices)].prod() * gradient(algorithm, [make(indices)], logits)
    return total
