"""Where responses end and what their text is, with a network that says exactly what is wanted of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignlab.core import ConfigError, Group, Response
from alignlab.models import PackedModel
from alignlab.rollout import LocalRollout
from tests.rollout.tiny import END, EOS, PIECES, Scripted, ids, network, tokenizer

ALPHABET = {
    "d": "a|<eos>",
    "a": "b|<eos>",
    "b": "ca|<eos>",
    "ca": "e",
    "e": "<eos>|f",
    "g": "\n",
}
"""After the prompt `d`: a, b, ca, e, end. Text `abcae`."""


def answer(wishes: dict[str, str] = ALPHABET, prompt: str = "d", **settings: Any) -> Response:
    model = PackedModel(Scripted(wishes), tokenizer())
    engine = LocalRollout(temperature=0, **settings).sampler(model)
    return engine.sample([Group(ids(prompt), origin="p:1")], 1, 0)[0].responses[0]


def test_end_token_is_kept_and_ends() -> None:
    response = answer()
    assert (response.token_ids, response.text, response.finished) == (ids("a|b|ca|e|<eos>"), "abcae", True)
    assert list(response.columns["behaviour_logp"]) == [0.0] * 5


def test_length_limit_is_unfinished() -> None:
    response = answer(max_new_tokens=4)
    assert (response.token_ids, response.text, response.finished) == (ids("a|b|ca|e"), "abcae", False)


def test_end_token_at_the_limit_is_finished() -> None:
    assert answer(max_new_tokens=5).finished


@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [
        (["bc"], "a|b|ca", "a"),  # over two tokens, and the last goes on after it
        (["a"], "a", ""),
        (["ae"], "a|b|ca|e", "abc"),
        (["cae", "ca", "bca"], "a|b|ca", "a"),  # completed by the same token: cut at the earliest
        (["zz", "abc"], "a|b|ca", ""),
        (["x"], "a|b|ca|e|<eos>", "abcae"),
    ],
)
def test_stop_strings(stop: list[str], tokens: str, text: str) -> None:
    response = answer(stop=stop)
    assert (response.token_ids, response.text, response.finished) == (ids(tokens), text, True)


def test_stop_string_completed_at_the_limit_is_finished() -> None:
    response = answer(stop=["bc"], max_new_tokens=3)
    assert (response.text, response.finished) == ("a", True)


def test_stop_string_late_in_a_long_response() -> None:
    """Only the end of a response is looked at for each token; the cut is in the whole text."""
    looping = {"d": "h", "h": "i", "i": "j", "j": "k", "k": "l", "l": "h"}
    assert not answer(looping, max_new_tokens=40, stop=["lg"]).finished
    response = answer(looping, max_new_tokens=40, stop=["lhi"], min_new_tokens=26)
    assert len(response.token_ids) == 27, "h i j k l again and again; 'lhi' ends at tokens 7, 12, 17, 22, 27"
    assert response.text == "hijkl" * 4 + "hijk", "cut before token 25"
    response = answer(looping, max_new_tokens=40, stop=["hijkl" * 6])
    assert (len(response.token_ids), response.text, response.finished) == (30, "", True), "as many tokens as characters"


def test_min_new_tokens_keeps_end_tokens_away() -> None:
    assert answer({"d": "<eos>|e", "e": "<eos>|f", "f": "<eos>"}, min_new_tokens=1).token_ids == ids("e|<eos>")
    assert answer({"d": "<eos>|e", "e": "<eos>|f", "f": "<eos>"}, min_new_tokens=2).token_ids == ids("e|f|<eos>")


def test_min_new_tokens_agrees_with_transformers() -> None:
    net = network("llama")
    with torch.no_grad():
        net.lm_head.weight[EOS] = 3 * net.lm_head.weight[10]  # an eager end token
    prompt = ids("d|e|f")
    lengths = []
    for least in (0, 3, 6):
        expected = net.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, min_new_tokens=least, pad_token_id=0
        )[0, 3:].tolist()
        settings = LocalRollout(temperature=0, max_new_tokens=20, min_new_tokens=least)
        engine = settings.sampler(PackedModel(net, tokenizer()))
        assert engine.sample([Group(prompt)], 1, 0)[0].responses[0].token_ids == expected
        lengths.append(len(expected))
    assert lengths[0] < lengths[2]


def test_stop_string_within_the_first_tokens_does_not_count() -> None:
    response = answer(stop=["b"], min_new_tokens=2)
    assert response.token_ids == ids("a|b|ca|e|<eos>")
    response = answer(stop=["bc", "e"], min_new_tokens=2)
    assert (response.token_ids, response.text) == (ids("a|b|ca"), "a"), "completed by the third token"
    response = answer(stop=["bc", "e"], min_new_tokens=3)
    assert (response.token_ids, response.text) == (ids("a|b|ca|e"), "abca")


@pytest.mark.parametrize("stop_tokens", [[PIECES.index("\n")], ["\n"]])
def test_stop_tokens_by_id_or_text(stop_tokens: list[int | str]) -> None:
    response = answer(prompt="g", stop_tokens=stop_tokens)
    assert (response.token_ids, response.finished) == (ids("\n"), True)


def test_special_tokens_are_not_text_and_stop_when_asked() -> None:
    wishes = {"f": "<end>|g", "<end>": "g", "g": "<eos>"}
    response = answer(wishes, prompt="f")
    assert (response.token_ids, response.text) == (ids("<end>|g|<eos>"), "g")
    for settings in ({"stop": ["<end>"]}, {"stop_tokens": ["<end>"]}):
        response = answer(wishes, prompt="f", **settings)
        assert (response.token_ids, response.text, response.finished) == ([END], "", True)


def test_end_tokens_of_the_generation_config_count() -> None:
    network = Scripted({"d": "e", "e": "f", "f": "g"})
    network.generation_config.eos_token_id = [EOS, PIECES.index("f")]
    engine = LocalRollout(temperature=0, max_new_tokens=9).sampler(PackedModel(network, tokenizer()))
    response = engine.sample([Group(ids("d"))], 1, 0)[0].responses[0]
    assert (response.token_ids, response.finished) == (ids("e|f"), True)


def test_end_token_of_the_tokenizer_counts() -> None:
    network = Scripted(ALPHABET)
    network.generation_config.eos_token_id = None
    engine = LocalRollout(temperature=0, max_new_tokens=9).sampler(PackedModel(network, tokenizer()))
    assert engine.greedy([Group(ids("d"))])[0].responses[0].token_ids == ids("a|b|ca|e|<eos>")


def test_suppressed_tokens_are_never_drawn() -> None:
    assert answer(suppress_tokens=["b"]).token_ids == ids("a|<eos>")
    model = PackedModel(Scripted({}), tokenizer())
    allowed = {PIECES.index("d"), PIECES.index("e")}
    banned = [i for i in range(len(PIECES)) if i not in allowed]
    engine = LocalRollout(max_new_tokens=8, suppress_tokens=banned).sampler(model)
    drawn = {t for r in engine.sample([Group(ids("d"))], 20, 0)[0].responses for t in r.token_ids}
    assert drawn == allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_tokens": ["two words"]}, "rollout.stop_tokens: 'two words'"),
        ({"suppress_tokens": [99]}, "rollout.suppress_tokens: the model has no token 99"),
        ({"stop_tokens": [-1]}, "rollout.stop_tokens: the model has no token -1"),
        ({"suppress_tokens": list(range(len(PIECES)))}, "no token is left"),
        ({"suppress_tokens": [i for i in range(len(PIECES)) if i != EOS], "min_new_tokens": 1}, "no token is left"),
    ],
)
def test_impossible_tokens_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        answer(**settings)
