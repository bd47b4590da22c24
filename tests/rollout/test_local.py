"""The engine's contract: what it returns, what a response depends on, what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch

from alignlab.core import AlignlabError, ConfigError, DataError, Group, NonFiniteError, Response, Sampler
from alignlab.models import PackedModel
from alignlab.rollout import LocalRollout, best_of, local
from alignlab.rollout.local import LocalSampler
from tests.rollout.tiny import EOS, model, network, plain_logp, prompts, tokenizer

MIXED = (3, 17, 9, 3, 30, 1)


@pytest.fixture(scope="module")
def llama() -> PackedModel:
    return model("llama")


def engine(packed: PackedModel, progress: bool = True, **settings: object) -> LocalSampler:
    return LocalSampler(packed, LocalRollout(**{"max_new_tokens": 8, **settings}), progress)  # type: ignore[arg-type]


def tokens(groups: Sequence[Group]) -> list[list[list[int]]]:
    return [[r.token_ids for r in g.responses] for g in groups]


# ---------------------------------------------------------------------- what is returned


def test_contract(llama: PackedModel) -> None:
    given = prompts(*MIXED)
    for i, group in enumerate(given):
        group.prompt, group.extra, group.columns = f"prompt {i}", {"answer": i}, {"weight": float(i)}
        group.responses = [Response([3], text="from the data")]
    sampler = engine(llama)
    assert isinstance(sampler, Sampler)
    sampled = sampler.sample(given, 3, 0)
    assert [g.prompt_ids for g in sampled] == [g.prompt_ids for g in given]
    assert [g.origin for g in sampled] == [g.origin for g in given]
    assert [g.prompt for g in sampled] == [g.prompt for g in given]
    assert [g.extra["answer"] for g in sampled] == list(range(6))
    assert [g.columns for g in sampled] == [{"weight": float(i)} for i in range(6)]
    assert all(len(g.responses) == 1 for g in given), "the groups given must not change"
    responses = [r for g in sampled for r in g.responses]
    assert len(responses) == 18
    for response in responses:
        assert response.source == "policy"
        assert response.loss_mask is None
        assert 1 <= len(response.token_ids) <= 8
        assert len(response.columns["behaviour_logp"]) == len(response.token_ids)  # type: ignore[arg-type]
        assert all(x <= 0 for x in response.columns["behaviour_logp"])  # type: ignore[union-attr]
        assert response.finished == (response.token_ids[-1] == EOS)
        assert EOS not in response.token_ids[:-1]
        assert response.text == llama.tokenizer.decode(response.token_ids, skip_special_tokens=True)
    assert {r.finished for r in responses} == {True, False}
    counted = sum(len(r.token_ids) for r in responses)
    assert sampler.generated_tokens == counted
    sampler.sample(given, 3, 0)
    assert sampler.generated_tokens == 2 * counted


def test_nothing_to_do(llama: PackedModel) -> None:
    assert engine(llama).sample([], 2, 0) == []


# ---------------------------------------------------------------------- what a response depends on


def test_a_response_depends_on_seed_prompt_and_index_alone(llama: PackedModel) -> None:
    groups = prompts(*MIXED)
    expected = tokens(engine(llama).sample(groups, 3, 7))
    assert len({str(r) for g in expected for r in g}) > 12, "random enough to tell"

    alone = [tokens(engine(llama).sample([g], 3, 7))[0] for g in groups]
    assert alone == expected, "what else is in the batch"
    for budget in (1, 60, 200):
        assert tokens(engine(llama, max_batch_tokens=budget).sample(groups, 3, 7)) == expected, "the token budget"
    assert tokens(engine(llama).sample(groups[::-1], 3, 7))[::-1] == expected, "the order"
    shares = [groups[rank::3] for rank in range(3)]
    parts = [tokens(engine(llama).sample(share, 3, 7)) for share in shares]
    assert [parts[i % 3][i // 3] for i in range(6)] == expected, "the number of processes"
    assert [g[:2] for g in expected] == tokens(engine(llama).sample(groups, 2, 7)), "the number of samples"
    torch.manual_seed(123)
    assert tokens(engine(llama).sample(groups, 3, 7)) == expected, "the global random state"


def test_seeds_and_samples_differ(llama: PackedModel) -> None:
    groups = prompts(5)
    drawn = [tokens(engine(llama).sample(groups, 4, seed))[0] for seed in (0, 1)]
    assert len({str(r) for g in drawn for r in g}) == 8


def test_equal_prompts_get_samples_of_their_own(llama: PackedModel) -> None:
    prompt = prompts(6)[0].prompt_ids
    twins = [Group(prompt, origin="a.jsonl:1"), Group(prompt, origin="a.jsonl:2")]
    first, second = tokens(engine(llama).sample(twins, 3, 0))
    assert first != second, "two records with the same prompt"
    assert tokens(engine(llama).sample(twins[1:], 3, 0)) == [second]

    same = [Group(prompt, origin="a.jsonl:1")] * 2
    first, second = tokens(engine(llama).sample(same, 3, 0))
    assert first + second == tokens(engine(llama).sample(same[:1], 6, 0))[0], "a record twice: its samples go on"
    moved = [Group(prompt, origin="/other/folder/a.jsonl:1")]
    assert tokens(engine(llama).sample(moved, 3, 0)) == [first]


def test_padding_does_not_matter(llama: PackedModel) -> None:
    short, long = prompts(2, 40)
    together = engine(llama).sample([short, long], 4, 0)[0]
    alone = engine(llama).sample([short], 4, 0)[0]
    assert tokens([together]) == tokens([alone])
    for a, b in zip(together.responses, alone.responses, strict=True):
        assert a.columns["behaviour_logp"] == pytest.approx(b.columns["behaviour_logp"], abs=1e-5)


def test_filters_and_temperature_are_those_of_the_settings(llama: PackedModel) -> None:
    groups = prompts(4, 9)
    sampled = engine(llama, temperature=0.7, top_k=3, top_p=0.9).sample(groups, 5, 0)
    for group in sampled:
        for response in group.responses:
            for i, logp in enumerate(response.columns["behaviour_logp"]):  # type: ignore[arg-type]
                context = group.prompt_ids + response.token_ids[:i]
                with torch.no_grad():
                    logits = llama.network(input_ids=torch.tensor([context])).logits[0, -1]
                top = (logits / 0.7).topk(3)
                p = top.values.softmax(-1)
                kept = 1 + int((p.cumsum(-1) < 0.9).sum())
                place = top.indices.tolist().index(response.token_ids[i])
                assert place < kept
                assert logp == pytest.approx((p[place] / p[:kept].sum()).log().item(), abs=1e-5)


def test_greedy_ignores_temperature_and_counts(llama: PackedModel) -> None:
    sampler = engine(llama, temperature=1.3)
    best = sampler.greedy(prompts(*MIXED))
    assert tokens(best) == tokens(engine(llama, temperature=0).sample(prompts(*MIXED), 1, 99))
    assert sampler.generated_tokens == sum(len(g.responses[0].token_ids) for g in best)


# ---------------------------------------------------------------------- the model's state


@pytest.mark.parametrize("training", [True, False])
def test_no_dropout_no_gradient_and_the_mode_restored(training: bool) -> None:
    packed = PackedModel(network("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), tokenizer())
    packed.train(training)
    grad_enabled = []
    packed.base.lm_head.register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    sampled = engine(packed).sample(prompts(4), 3, 0)[0]
    assert packed.training == packed.base.transformer.h[0].training == training
    assert grad_enabled and not any(grad_enabled)
    for response in sampled.responses:
        expected = plain_logp(packed.base, sampled.prompt_ids, response.token_ids)
        assert response.columns["behaviour_logp"] == pytest.approx(expected, abs=1e-5)


def test_peft_samples_from_the_active_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    base = network("llama")
    base_drawn = engine(PackedModel(base, tokenizer())).sample(prompts(4, 9), 3, 0)
    peft = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    packed = PackedModel(peft, tokenizer())
    sampled = engine(packed).sample(prompts(4, 9), 3, 0)
    assert tokens(sampled) != tokens(base_drawn)
    for group in sampled:
        for response in group.responses:
            expected = plain_logp(peft, group.prompt_ids, response.token_ids)
            assert response.columns["behaviour_logp"] == pytest.approx(expected, abs=1e-5)
    with peft.disable_adapter():
        assert tokens(engine(packed).sample(prompts(4, 9), 3, 0)) == tokens(base_drawn)


# ---------------------------------------------------------------------- limits and refusals


def test_positions_limit_responses_with_a_notice(llama: PackedModel, caplog: pytest.LogCaptureFixture) -> None:
    assert llama.max_length == 64
    groups = prompts(10, 60, 63)
    with caplog.at_level(logging.WARNING):
        sampled = engine(llama, max_new_tokens=20, suppress_tokens=[EOS]).sample(groups, 2, 0)
    assert [[len(r.token_ids) for r in g.responses] for g in sampled] == [[20, 20], [4, 4], [1, 1]]
    assert not any(r.finished for g in sampled for r in g.responses)
    assert "2 of 3 prompts leave less room than max_new_tokens=20 in the model's 64 positions" in caplog.text


def test_a_prompt_without_room_is_named(llama: PackedModel) -> None:
    with pytest.raises(DataError, match=r"^prompts.jsonl:2: the prompt has 64 tokens and the model knows 64"):
        engine(llama).sample(prompts(3, 64), 1, 0)


def test_an_empty_prompt_is_named(llama: PackedModel) -> None:
    with pytest.raises(DataError, match=r"^here:3: the prompt has no tokens"):
        engine(llama).sample([Group([], origin="here:3")], 1, 0)


def test_broken_weights_are_noticed() -> None:
    packed = model("llama")
    with torch.no_grad():
        packed.base.model.norm.weight[0] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError, match=r"^prompts.jsonl:1: the model's logits are not finite"):
            engine(packed, temperature=temperature).sample(prompts(3), 1, 0)
    assert packed.training, "the mode is restored after an error too"


def test_impossible_requests(llama: PackedModel) -> None:
    with pytest.raises(ConfigError, match="n=0"):
        engine(llama).sample(prompts(3), 0, 0)
    with pytest.raises(ConfigError, match="score model"):
        engine(PackedModel(llama.network, llama.tokenizer, "score"))


# ---------------------------------------------------------------------- progress, best of n


def test_progress_counts_responses(llama: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorder(items, label, total):  # type: ignore[no-untyped-def]
        count = sum(1 for _ in items)
        seen.append((label, count, total))
        yield from ()

    monkeypatch.setattr(local, "progress", recorder)
    expected = tokens(engine(llama, progress=False).sample(prompts(*MIXED), 3, 0))
    assert not seen
    assert tokens(engine(llama, max_batch_tokens=100).sample(prompts(*MIXED), 3, 0)) == expected
    assert seen == [("generating", 18, 18)]


class _Shortest:
    fills = ("reward",)

    def score(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for response in group.responses:
                response.columns["reward"] = -float(len(response.token_ids))


def test_best_of(llama: PackedModel) -> None:
    sampled = engine(llama).sample(prompts(*MIXED), 5, 3)
    best = best_of(engine(llama), _Shortest(), prompts(*MIXED), 5, 3)
    assert [len(g.responses) for g in best] == [1] * 6
    for group, all_ in zip(best, tokens(sampled), strict=True):
        shortest = min(len(r) for r in all_)
        assert group.responses[0].token_ids == next(r for r in all_ if len(r) == shortest), "the first among equals"
        assert group.responses[0].columns["reward"] == -float(shortest)
    with pytest.raises(AlignlabError, match="fills reward, not 'score'"):
        best_of(engine(llama), _Shortest(), prompts(3), 2, 0, column="score")
