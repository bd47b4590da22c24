"""Exact log-probs of all completions against a model's own, one sequence at a time; the figures made of them."""

import math
import random

import pytest
import torch

from alignlab.benchmarks.exact.enumeration import chain, completion_log_probs
from alignlab.benchmarks.exact.language import ExactWorld, ExactWorldSettings
from alignlab.benchmarks.exact.metrics import policy_metrics
from alignlab.core import AlignlabError, ConfigError


def tiny_llama(vocabulary: int, seed: int = 0, dropout: float = 0.0):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,  # far from uniform
            attention_dropout=dropout,
            bos_token_id=None,
            eos_token_id=vocabulary - 1,
        )
        return LlamaForCausalLM(config)


def one_by_one(network, world: ExactWorld, x: int, y: int, temperature: float = 1.0) -> float:
    prompt, completion = world.prompt_ids[x], world.token_ids(y)
    with torch.no_grad():
        logits = network.eval()(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    logp = (logits.double() / temperature).log_softmax(-1)
    return sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    return ExactWorld()


@pytest.mark.parametrize(("dtype", "tolerance", "total"), [(torch.float32, 2e-5, 1e-6), (torch.float64, 1e-11, 1e-12)])
def test_against_one_sequence_at_a_time(world, dtype, tolerance, total):
    network = tiny_llama(12).to(dtype)
    logp_XY = completion_log_probs(network, world)
    assert logp_XY.shape == (6, 16_105)
    assert logp_XY.dtype == torch.float64
    torch.testing.assert_close(logp_XY.exp().sum(-1), torch.ones(6, dtype=torch.float64), atol=total, rtol=0)
    rng = random.Random(0)
    for y in [0, 1, 11, 12, 1463, 1464, 16_104, *rng.sample(range(world.Y), 60)]:
        x = rng.randrange(6)
        assert logp_XY[x, y].item() == pytest.approx(one_by_one(network, world, x, y), abs=tolerance)


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_other_lengths(max_tokens):
    world = ExactWorld(ExactWorldSettings(words=3, max_tokens=max_tokens, prompts=2))
    network = tiny_llama(4).double()
    expected = [[one_by_one(network, world, x, y) for y in range(world.Y)] for x in range(2)]
    torch.testing.assert_close(completion_log_probs(network, world), torch.tensor(expected, dtype=torch.float64))


def test_temperature_and_batching(monkeypatch):
    monkeypatch.setattr("alignlab.benchmarks.exact.enumeration.ROWS", 2)
    world = ExactWorld(ExactWorldSettings(words=3, max_tokens=3, prompts=2))
    network = tiny_llama(4).double()
    expected = [[one_by_one(network, world, x, y, 0.7) for y in range(world.Y)] for x in range(2)]
    in_small_parts = completion_log_probs(network, world, temperature=0.7)
    torch.testing.assert_close(in_small_parts, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ConfigError, match="temperature"):
        completion_log_probs(network, world, temperature=0.0)


def test_evaluation_mode_without_gradient_and_the_modes_restored():
    world = ExactWorld(ExactWorldSettings(words=3, max_tokens=2, prompts=1))
    network = tiny_llama(4, dropout=0.5).train()
    before = {name: module.training for name, module in network.named_modules()}
    logp_XY = completion_log_probs(network, world)
    assert {name: module.training for name, module in network.named_modules()} == before
    assert not logp_XY.requires_grad
    torch.testing.assert_close(logp_XY, completion_log_probs(network.eval(), world), atol=1e-6, rtol=0)


def test_modes_are_restored_after_an_error():
    network = tiny_llama(5).train()
    with pytest.raises(AlignlabError, match="vocabulary of 5 tokens"):
        completion_log_probs(network, ExactWorld(ExactWorldSettings(words=3, prompts=1)))
    assert network.training


def test_chain_by_hand():
    """Two words a and b, up to two of them; the steps as probabilities of a, b and the end."""
    first = [[[0.5, 0.3, 0.2]]]
    second = [[[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]]
    steps = [torch.tensor(first).double().log(), torch.tensor(second).double().log()]
    expected = [0.2, 0.5 * 0.7, 0.3 * 0.1, 0.5 * 0.1, 0.5 * 0.2, 0.3 * 0.6, 0.3 * 0.3]
    torch.testing.assert_close(chain(steps).exp(), torch.tensor([expected]).double())


def test_metrics_of_the_optimum_and_of_the_reference():
    """Two outcomes, equally likely, rewards 0 and 1, beta 1: the optimum is (1, e) / (1 + e)."""
    reference, reward = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.0, 1.0]]).double()
    p = math.e / (1 + math.e)
    kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    best = policy_metrics(torch.tensor([[1 - p, p]]).double().log(), reference, reward, beta=1.0)
    assert best == pytest.approx(
        {
            "reward": p,
            "kl": kl,
            "entropy": math.log(2) - kl,
            "win_rate": p * 0.75 + (1 - p) * 0.25,
            "objective": p - kl,
            "objective_score": 1.0,
            "frontier_efficiency": 1.0,
            "reference_reward": 0.5,
            "reference_entropy": math.log(2),
            "optimum_reward": p,
            "optimum_kl": kl,
        }
    )
    idle = policy_metrics(reference, reference, reward, beta=1.0)
    assert (idle["reward"], idle["kl"], idle["win_rate"], idle["objective_score"]) == pytest.approx((0.5, 0, 0.5, 0))
    assert math.isnan(idle["frontier_efficiency"])


def test_metrics_agree_with_log_probs_computed_one_by_one():
    world = ExactWorld(ExactWorldSettings(words=3, max_tokens=3, prompts=2))
    policy, reference = tiny_llama(4, seed=1), tiny_llama(4, seed=2)
    logp_XY, ref_logp_XY = (completion_log_probs(model, world, 0.9) for model in (policy, reference))
    result = policy_metrics(logp_XY, ref_logp_XY, world.reward_XY, beta=0.1)
    p, q = (torch.tensor([[one_by_one(m, world, x, y, 0.9) for y in range(world.Y)] for x in range(2)]) for m in
            (policy, reference))  # fmt: skip
    assert result["reward"] == pytest.approx((p.exp() * world.reward_XY).sum(-1).mean().item(), abs=1e-5)
    assert result["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-5)
    assert result["objective_score"] < 1
    assert result["frontier_efficiency"] < 1
