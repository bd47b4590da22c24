"""The losses that TRL has too, against TRL's own code on random batches: losses and gradients with respect to logits.

Policy and reference are tables of bigram logits, so that both sides compute their log-probs themselves. TRL's trainers
are called without their constructors, which want a model, a tokenizer and a dataset: the methods that compute losses
get an object with the settings that they read. The losses were written against 1.16. TRL has no RRHF, SLiC-HF or cDPO.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.algorithms.dpo import DPO
from alignlab.algorithms.hinge import Hinge
from alignlab.algorithms.ipo import IPO
from alignlab.algorithms.kto import KTO
from alignlab.algorithms.orpo import ORPO, log_odds
from alignlab.algorithms.simpo import SimPO
from alignlab.core import Algorithm, Batch, Group, Outputs, Response, aggregate
from tests.components import missing, need

WORDS, PAIRS = 11, 6
PAD = 0


def trl(module: str, name: str, method: str) -> Any:
    """A class of TRL's, or a skip that says what is missing."""
    need("trl")
    try:
        found = getattr(import_module(f"trl.{module}"), name)
    except (ImportError, AttributeError):
        missing(f"this TRL has no trl.{module}.{name}")
    if not hasattr(found, method):
        missing(f"this TRL has no {name}.{method}")
    return found


class Accelerator:
    """That of one process."""

    device = torch.device("cpu")

    @staticmethod
    def gather(value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


def settings(**values: Any) -> Any:
    """What stands for a trainer."""
    common = {"accelerator": Accelerator(), "aux_loss_enabled": False, "precompute_ref_logps": True, "ld_alpha": None}
    metrics: dict[str, Any] = {"train": _Lists()}
    rest = {"_metrics": metrics, "_total_train_tokens": 0, "_tp_size": 1, "use_weighting": False}
    return SimpleNamespace(model=SimpleNamespace(training=True), loss_weights=[1.0], **{**common, **rest, **values})


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        self[key] = []
        return self[key]


class Bigrams:
    """A language model that looks at one token, called as TRL calls a model with a fused head."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = (2 * torch.randn(WORDS, WORDS, generator=generator, dtype=torch.float64)).requires_grad_()

    def logits(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]

    def __call__(self, input_ids: Tensor, labels: Tensor, **_: Any) -> Any:
        """Zero where the label is -100, as TRL says of its own."""
        logits, target = self.logits(input_ids)[:, :-1], labels[:, 1:]
        logp = logits.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        zero = torch.zeros_like(logp)
        return SimpleNamespace(
            log_probs=torch.where(target == -100, zero, logp), entropy=zero, mean_logits=zero, is_top1=zero == 0
        )

    def of(self, group: Group, response: Response) -> Tensor:
        """Log-probs of the response's tokens."""
        ids = torch.tensor([group.prompt_ids[-1], *response.token_ids])
        return self.table.log_softmax(-1)[ids[:-1], ids[1:]]

    def fill(self, groups: list[Group], column: str) -> None:
        for g in groups:
            for r in g.responses:
                r.columns[column] = self.of(g, r).tolist()

    def loss(self, algorithm: Algorithm, groups: list[Group]) -> Tensor:
        """Ours, a mean over the batch."""
        logp_T = torch.cat([self.of(g, r) for g in groups for r in g.responses])
        batch = Batch(groups)
        return aggregate(algorithm.loss(Outputs(logp_T=logp_T), batch)[0], batch.count(algorithm.unit))


def words(generator: torch.Generator, low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high, (), generator=generator))
    return torch.randint(1, WORDS, (length,), generator=generator).tolist()


def pairs(seed: int, prompt: int | None = None) -> list[Group]:
    """With prompts of a few lengths, or of one."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Group(
            [i + 1, *words(generator, *((0, 4) if prompt is None else (prompt - 1, prompt)))],
            [Response(words(generator, 1, 6), columns={"score": score}) for score in (1.0, 0.0)],
        )
        for i in range(PAIRS)
    ]


def assert_same(ours: Tensor, theirs: Tensor, model: Bigrams) -> None:
    """In float32 accuracy: columns are stored so."""
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    (a,), (b,) = (torch.autograd.grad(value, model.table, retain_graph=True) for value in (ours, theirs))
    assert float(b.abs().max()) > 0
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def summed(groups: list[Group], which: int, column: str) -> Tensor:
    return torch.tensor([sum(g.responses[which].columns[column]) for g in groups])  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss_type", "beta", "algorithm"),
    [("sigmoid", 0.3, DPO(0.3)), ("ipo", 0.2, IPO(0.2)), ("hinge", 0.1, Hinge(0.1))],
    ids=["dpo", "ipo", "hinge"],
)
def test_losses_equal_trl_s_dpo_trainer(loss_type: str, beta: float, algorithm: Algorithm, seed: int) -> None:
    trainer = trl("trainer.dpo_trainer", "DPOTrainer", "_compute_loss")
    collate = trl("trainer.dpo_trainer", "DataCollatorForPreference", "torch_call")(pad_token_id=PAD)
    policy, reference, groups = Bigrams(seed), Bigrams(seed + 100), pairs(seed)
    reference.fill(groups, "ref_logp")
    inputs = collate.torch_call(
        [
            {
                "prompt_ids": g.prompt_ids,
                "chosen_ids": g.responses[0].token_ids,
                "rejected_ids": g.responses[1].token_ids,
            }
            for g in groups
        ]
    )
    inputs |= {f"ref_{name}_logps": summed(groups, i, "ref_logp") for i, name in enumerate(("chosen", "rejected"))}
    stand_in = settings(loss_types=[loss_type], beta=beta, f_divergence_type="reverse_kl")
    theirs = trainer._compute_loss(stand_in, policy, inputs, False)
    assert_same(policy.loss(algorithm, groups), theirs, policy)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("other", [False, True], ids=["as they are", "roles changed"])
def test_kto_equals_trl_s_kto_trainer(seed: int, other: bool) -> None:
    """With TRL's own rotation: each prompt has the completion of the one before it. Where an estimate of the KL
    is below zero, it is above it once the two tables change roles."""
    trainer = trl("trainer.kto_trainer", "KTOTrainer", "_compute_loss")
    collate = trl("trainer.kto_trainer", "DataCollatorForUnpairedPreference", "torch_call")(pad_token_id=PAD)
    policy, reference = (Bigrams(seed + 100 * (k is other)) for k in (True, False))
    # Prompts of one length, since ours cuts a response that would make a row longer than those that are there.
    groups = [g.with_responses(g.responses[:1]) for g in pairs(seed, prompt=3)]
    for i, g in enumerate(groups):
        g.responses[0].columns = {"desirable": float(i % 3 > 0)}
    algorithm = KTO(0.3, 1.25, 0.75)
    arranged = algorithm.arrange(groups)
    reference.fill(arranged, "ref_logp")
    policy.fill(arranged, "old_logp")
    examples = [
        {
            "prompt_ids": g.prompt_ids,
            "completion_ids": g.responses[0].token_ids,
            "KL_completion_ids": groups[i - 1].responses[0].token_ids,
            "label": i % 3 > 0,
            "ref_logps": float(summed(arranged, 0, "ref_logp")[i]),
            "ref_KL_logps": float(summed(arranged, 1, "ref_logp")[i]),
        }
        for i, g in enumerate(groups)
    ]
    stand_in = settings(calculate_KL=True, loss_type="kto", beta=0.3, desirable_weight=1.25, undesirable_weight=0.75)
    stand_in._compute_kl_logps = lambda model, batch: trainer._compute_kl_logps(stand_in, model, batch)
    theirs = trainer._compute_loss(stand_in, policy, collate.torch_call(examples), False)
    prepared = algorithm.prepare(arranged)
    assert (prepared[0].columns["z_ref"] > 1.0) is other
    assert prepared[0].columns["z_ref"] == pytest.approx(stand_in._metrics["train"]["kl"][0], rel=1e-5)
    assert_same(policy.loss(algorithm, prepared), theirs, policy)


def averages(trainer: Any, policy: Bigrams, groups: list[Group], which: int) -> Tensor:
    """TRL's mean log-prob per token of the winners (0) or losers (1)."""
    longest = max(len(g.prompt_ids) + len(g.responses[which].token_ids) for g in groups)
    ids, labels = torch.full((PAIRS, longest), PAD), torch.full((PAIRS, longest), -100)
    for i, g in enumerate(groups):
        row, start = g.prompt_ids + g.responses[which].token_ids, len(g.prompt_ids)
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return trainer.get_batch_logps(policy.logits(ids), labels, average_log_prob=True)


@pytest.mark.parametrize("seed", range(3))
def test_simpo_equals_trl_s_cpo_trainer(seed: int) -> None:
    trainer = trl("experimental.cpo", "CPOTrainer", "cpo_loss")
    policy, groups = Bigrams(seed), pairs(seed)
    stand_in = settings(beta=2.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0, alpha=0.0)
    losses, *_ = trainer.cpo_loss(stand_in, *(averages(trainer, policy, groups, which) for which in (0, 1)))
    assert_same(policy.loss(SimPO(beta=2.0, gamma=0.7), groups), losses.mean(), policy)


def orpo_trainer(policy: Bigrams, groups: list[Group], weight: float) -> Tensor:
    """TRL's whole ORPO loss but for its likelihood term, which counts the prompt's tokens where the paper has the
    response's: it gets ours."""
    trainer = trl("experimental.orpo", "ORPOTrainer", "get_batch_loss_metrics")
    winner_P, loser_P = (averages(trainer, policy, groups, which) for which in (0, 1))
    stand_in = settings(beta=weight)
    stand_in.odds_ratio_loss = lambda *logps: trainer.odds_ratio_loss(stand_in, *logps)
    stand_in.concatenated_forward = lambda *_: (winner_P, loser_P, winner_P, loser_P, -winner_P.mean())
    return trainer.get_batch_loss_metrics(stand_in, None, {})[0]


@pytest.mark.parametrize("seed", range(3))
def test_orpo_equals_trl_s_orpo_trainer(seed: int) -> None:
    policy, groups = Bigrams(seed), pairs(seed)
    assert_same(policy.loss(ORPO(ratio_weight=0.4), groups), orpo_trainer(policy, groups, 0.4), policy)


def test_log_odds_equal_trl() -> None:
    log1mexp: Callable[[Tensor], Tensor] = trl("experimental.orpo.orpo_trainer", "log1mexp", "__call__")
    logp = torch.tensor([-1e-6, -1e-3, -0.5, -0.69, -0.70, -3.0, -80.0])
    torch.testing.assert_close(log_odds(logp), logp - log1mexp(logp))
