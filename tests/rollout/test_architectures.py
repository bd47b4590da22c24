"""Generation is exact for every kind of architecture, and costs what it should."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from alignlab.core import Group
from alignlab.models import PackedModel
from alignlab.models.probe import probe
from alignlab.rollout import LocalRollout, local
from alignlab.rollout.continuous import takes_plans
from alignlab.rollout.decoding import Mode, decoding_mode
from tests.rollout.tiny import EOS, PIECES, model, network, plain_logp, prompts, tokenizer

BOTH = Mode(cached=True, padded=True)
MODES = {
    "llama": BOTH,
    "gpt2": BOTH,
    "gpt_neox": BOTH,
    "mistral": BOTH,  # a sliding window of 5, shorter than most prompts here
    "mistral, wide": BOTH,  # a window of 40, longer than all sequences here
    "qwen2": BOTH,
    "qwen3": BOTH,
    "phi": BOTH,
    "gemma": BOTH,
    "gemma2": BOTH,  # sliding and full attention, capped logits
    "bloom": BOTH,  # ALiBi
    "mamba": BOTH,  # states instead of keys and values
    "openai-gpt": Mode(cached=False, padded=True),  # transformers keeps no cache for it
    "recurrent_gemma": Mode(cached=False, padded=False),  # state inside its modules, no mask in its recurrence
}
LENGTHS = (2, 13, 7, 13, 30)
CONTINUOUS = {"llama", "gpt2", "gpt_neox", "mistral, wide", "qwen2", "qwen3", "phi", "gemma"}
"""Those whose rows come and go while others are drawn; the rest goes through transformers' cache, batch by batch."""

WAYS = [(name, way) for name in MODES for way in ("continuous", "cached") if way == "cached" or name in CONTINUOUS]


@pytest.fixture
def in_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "cached":
        monkeypatch.setattr(local, "takes_plans", lambda *_: False)


@pytest.mark.parametrize("name", MODES)
def test_which_networks_take_plans(name: str) -> None:
    packed = model(name)
    assert takes_plans(packed, 40) == (name in CONTINUOUS)
    assert not takes_plans(model("mistral, wide"), 41), "longer than the window"
    assert packed.base.config._attn_implementation in ("alignlab" if name in CONTINUOUS else "sdpa", "eager")


@pytest.mark.usefixtures("in_way")
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_behaviour_logp_is_the_plain_forward_s(name: str, way: str) -> None:
    packed = model(name)
    assert decoding_mode(packed) == MODES[name]
    settings = LocalRollout(max_new_tokens=10, stop_tokens=["a", "b", "c"])
    sampled = settings.sampler(packed).sample(prompts(*LENGTHS), 6, 0)
    for group in sampled:
        for response in group.responses:
            expected = plain_logp(packed.network, group.prompt_ids, response.token_ids)
            assert response.columns["behaviour_logp"] == pytest.approx(expected, abs=1e-5)
    assert len({len(r.token_ids) for g in sampled for r in g.responses}) > 3, "rows must end at different times"


@pytest.mark.usefixtures("in_way")
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_greedy_is_transformers_generate(name: str, way: str) -> None:
    packed = model(name)
    for group in LocalRollout(max_new_tokens=10).sampler(packed).greedy(prompts(*LENGTHS)):
        ids = torch.tensor([group.prompt_ids])
        generated = packed.network.eval().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, pad_token_id=0
        )
        assert group.responses[0].token_ids == generated[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "bloom", "mamba"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behaviour_logp_is_the_scoring_pass_s(name: str, temperature: float) -> None:
    packed = model(name)
    probe(packed)
    settings = LocalRollout(max_new_tokens=10, temperature=temperature)
    sampled = settings.sampler(packed).sample(prompts(*LENGTHS), 3, 0)
    scored = packed.outputs(sampled, temperature=temperature)["logp"]
    responses = [r for g in sampled for r in g.responses]
    for response, logp in zip(responses, scored, strict=True):
        assert response.columns["behaviour_logp"] == pytest.approx(logp.tolist(), abs=1e-5)


@pytest.mark.parametrize("loudness", [1.0, 1e-4])
def test_a_network_wrong_under_padding_is_found_out(loudness: float, caplog: pytest.LogCaptureFixture) -> None:
    """One that ignores position ids, as a learned-position model without them would, however faint its logits."""
    net = network("gpt2")
    with torch.no_grad():
        net.lm_head.weight *= loudness
    forward = net.forward

    def without_positions(input_ids, attention_mask=None, past_key_values=None, use_cache=None):  # type: ignore[no-untyped-def]
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache
        )

    net.forward = without_positions
    packed = PackedModel(net, tokenizer())
    with caplog.at_level(logging.WARNING):
        assert decoding_mode(packed) == Mode(cached=True, padded=False)
        decoding_mode(packed)
    assert caplog.text.count("only prompts of equal length are generated together") == 1, "tried and said once"
    for group in LocalRollout(max_new_tokens=5).sampler(packed).sample(prompts(*LENGTHS), 2, 0):
        for response in group.responses:
            expected = plain_logp(net, group.prompt_ids, response.token_ids)
            assert response.columns["behaviour_logp"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("in_way")
@pytest.mark.parametrize(("name", "way"), [("llama", "cached"), ("mamba", "cached")])
def test_one_prefill_per_prompt_and_ended_rows_leave(name: str) -> None:
    packed = model(name)
    groups = [*prompts(2, 13, 7, 30), *prompts(13, seed=9)]
    groups.append(Group(groups[0].prompt_ids, origin="elsewhere:1"))  # the same prompt in another record
    sampler = LocalRollout(max_new_tokens=12).sampler(packed)
    decoding_mode(packed)
    shapes: list[torch.Size] = []
    hook = packed.base.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: shapes.append(inputs[0].shape)
    )
    lengths = [len(r.token_ids) for g in sampler.sample(groups, 8, 0) for r in g.responses]
    hook.remove()
    assert len(set(lengths)) > 3, "rows must end at different times"
    assert shapes[0] == (5, 30), "five different prompts, padded to the longest"
    expected = [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]
    assert [tuple(s) for s in shapes[1:]] == expected, "a token for each row that still goes on"


@pytest.mark.usefixtures("in_way")
@pytest.mark.parametrize("way", ["cached"])
def test_batches_keep_to_the_token_budget(way: str) -> None:
    packed = model("llama")
    decoding_mode(packed)
    shapes: list[tuple[int, int]] = []
    packed.base.get_input_embeddings().register_forward_hook(lambda _, i, __: shapes.append(tuple(i[0].shape)))
    settings = LocalRollout(max_new_tokens=4, max_batch_tokens=100, suppress_tokens=[EOS])
    settings.sampler(packed).sample(prompts(2, 3, 16, 21, 46), 3, 0)
    # 46 + 4: two rows fit, so 2 + 1; then 21 + 4: four rows fit, of which 3 are used as 3 more do not; 16 + 4: five,
    # the same; 3 + 4: fourteen, both prompts of 3 rows.
    prefills, steps = [s for s in shapes if s[1] > 1], [s for s in shapes if s[1] == 1]
    assert prefills == [(1, 46), (1, 46), (1, 21), (1, 16), (2, 3)]
    assert [s[0] for s in steps] == [2] * 3 + [1] * 3 + [3] * 3 + [3] * 3 + [6] * 3


def test_a_real_model(stories: Path) -> None:
    from alignlab.models import ModelSettings, load_model

    packed = load_model(ModelSettings(path=str(stories)), trainable=False)
    texts = [
        "<|start_story|>Once upon a time, ",
        "<|start_story|>Tom ",
        "<|start_story|>One day, a little girl named Lily ",
    ]
    groups = prompts(*[1] * 3)
    for group, text in zip(groups, texts, strict=True):
        group.prompt_ids = packed.tokenizer(text, add_special_tokens=False)["input_ids"]
    for group in LocalRollout(max_new_tokens=30).sampler(packed).greedy(groups):
        ids = torch.tensor([group.prompt_ids])
        generated = packed.network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30
        )
        assert group.responses[0].token_ids == generated[0, ids.shape[1] :].tolist()
    stopped = LocalRollout(max_new_tokens=60, stop=["."]).sampler(packed).sample(groups, 4, 0)
    responses = [r for g in stopped for r in g.responses]
    assert any(r.finished for r in responses)
    for response in responses:
        text = packed.tokenizer.decode(response.token_ids, skip_special_tokens=True)
        before = packed.tokenizer.decode(response.token_ids[:-1], skip_special_tokens=True)
        assert "." not in response.text and "." not in before and text.startswith(response.text)
        assert ("." in text or response.token_ids[-1] == packed.tokenizer.eos_token_id) == response.finished


def test_vocabulary_of_the_tests() -> None:
    assert tokenizer()("a", add_special_tokens=False)["input_ids"] == [PIECES.index("a")]
