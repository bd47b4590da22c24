"""Simple Preference Optimization (Meng et al. 2024, arXiv:2405.14734): no reference, and a reward per token."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.algorithms.preferences import PairAlgorithm, pair_metrics, soft_label_loss
from alignlab.core import Batch, Metrics, Outputs, require


def simpo_loss(margin_P: Tensor, beta: float, gamma: float, probability_P: Tensor | float = 1.0) -> Tensor:
    """Equation 6, per pair, in nats, shape (P,).

    A soft label mirrors all of the logit, target margin included, as the authors' label smoothing does
    (github.com/princeton-nlp/SimPO): p·−log σ(u) + (1 − p)·−log σ(−u), u = beta·m − gamma. It is least where σ(u) = p.

    Args:
        margin_P: log-prob of the winner minus that of the loser, each a mean over tokens, in nats, shape (P,).
        beta: scale of the reward beta / |y| · log π (equation 4), > 0.
        gamma: how far the winner's reward should be above the loser's, >= 0.
        probability_P: probability that the winner is preferred, in [0.5, 1].
    """
    return soft_label_loss(lambda logit: -logsigmoid(logit), beta * margin_P - gamma, probability_P)


class SimPO(PairAlgorithm):
    """Learns from preference pairs. The implicit reward is the mean log-prob per token, as in decoding.

    Args:
        beta: scale of the reward, > 0. 2 to 2.5 in the paper, 10 for the authors' later models.
        gamma: how far the winner's reward should be above the loser's, >= 0. The authors advise 0.25 to 0.5 of beta.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        require(beta > 0, "algorithm.beta", beta, "must be > 0")
        require(gamma >= 0, "algorithm.gamma", gamma, "must be >= 0")
        self.beta, self.gamma = beta, gamma

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        logp_N = batch.mean(outputs.logp_T)
        margin_P = batch.pairs.difference(logp_N)
        loss_P = simpo_loss(margin_P, self.beta, self.gamma, batch.pairs.probability_P)
        return loss_P, pair_metrics(self.beta * logp_N, batch.pairs)
