"""Rewards and advantages of PPO, GRPO, RLOO and REINFORCE++: pure functions on flat vectors of tokens and responses.

Statistics, such as those of `whiten`, are over the vector that is given. For statistics over a whole iteration call
them in `prepare`, which gets all groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.core import segment_count, segment_mean, segment_std


def shaped_reward(penalty_T: Tensor, response_T: Tensor, score_N: Tensor | None, step_T: Tensor | None) -> Tensor:
    """Reward of each token, shape (T,) (Ziegler et al. 2019, arXiv:1909.08593, equation 2, by token).

    Args:
        penalty_T: subtracted from the reward of each token, shape (T,).
        response_T: the response of each token, ascending, int64, shape (T,).
        score_N: added at the last token of each response, shape (N,); that of a response without tokens is lost.
        step_T: added to each token: the reward of a step at its end, 0 elsewhere, shape (T,).
    """
    reward_T = -penalty_T if step_T is None else step_T - penalty_T
    if score_N is not None:
        length_N = segment_count(response_T, len(score_N))
        some_N = length_N > 0
        reward_T = reward_T.index_add(0, (length_N.cumsum(0) - 1)[some_N], score_N[some_N].to(reward_T))
    return reward_T


def gae(reward_T: Tensor, value_T: Tensor, response_T: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ·V_{t+1} - V_t (Schulman et al. 2016,
    arXiv:1506.02438, equation 16), shape (T,). The value after the last token of a response is 0.

    Args:
        reward_T: reward of each token, shape (T,).
        value_T: the critic's value just before each token, shape (T,).
        response_T: the response of each token, ascending, int64, shape (T,).
        gamma, lam: in [0, 1]; λ = 1 gives the discounted return minus the value.
    """
    next_T = torch.zeros_like(value_T)
    next_T[:-1] = torch.where(response_T[1:] == response_T[:-1], value_T[1:], 0.0)
    advantage_T = reward_T + gamma * next_T - value_T
    length_N = torch.unique_consecutive(response_T, return_counts=True)[1]
    end_N = length_N.cumsum(0)
    for back in range(2, int(length_N.max()) + 1 if len(length_N) else 0):  # all responses at once, from their ends
        token = (end_N - back)[length_N >= back]
        advantage_T[token] += gamma * lam * advantage_T[token + 1]
    return advantage_T


def whiten(x: Tensor, shift_mean: bool = True) -> Tensor:
    """x scaled to variance 1 and shifted to mean 0; without `shift_mean` it keeps its mean. Equal values give 0.

    The variance is that of the population (no Bessel's correction), as in github.com/openai/lm-human-preferences.
    """
    if not len(x):
        return x
    mean = x.mean()
    whitened = (x - mean) * torch.rsqrt((x - mean).square().mean() + 1e-8)
    return whitened if shift_mean else whitened + mean


def group_advantage(reward_N: Tensor, group_N: Tensor, count: int, normalize: bool, eps: float = 1e-6) -> Tensor:
    """(r − mean) / (std + eps) within each group, with Bessel's correction (Shao et al. 2024, arXiv:2402.03300,
    section 4.1.2); without `normalize` r − mean (Liu et al. 2025, arXiv:2503.20783). Shape (N,).

    Args:
        reward_N: r, shape (N,).
        group_N: the group of each response, int64, shape (N,).
        count: number of groups.
    """
    centred_N = reward_N - segment_mean(reward_N, group_N, count)[group_N]
    return centred_N / (segment_std(reward_N, group_N, count)[group_N] + eps) if normalize else centred_N


def leave_one_out_advantage(reward_N: Tensor, group_N: Tensor, count: int) -> Tensor:
    """r minus the mean of the group's other rewards (Ahmadian et al. 2024, arXiv:2402.14740, section 2.3), shape (N,).
    That is k/(k−1) times r − mean; 0 in a group of one. Arguments as in `group_advantage`."""
    size_N = segment_count(group_N, count)[group_N]
    centred_N = reward_N - segment_mean(reward_N, group_N, count)[group_N]
    return centred_N * size_N / (size_N - 1).clamp(min=1)
