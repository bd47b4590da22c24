"""Environments of several turns: what is written where, what bears loss, known answers; in sampling and training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignlab.config import compose, resolve
from alignlab.core import AlignlabError, ConfigError, Environment, Group, NeedsPolicy, Reports, Response
from alignlab.data.chat import CHATML, ChatTemplate
from alignlab.models import PackedModel
from alignlab.rollout import LocalRollout, MultiTurn, build_environment
from alignlab.rollout.policy import Policy
from alignlab.rollout.produce import produce
from tests.rollout.tiny import EOS, PIECES, Scripted, ids, network, plain_logp, prompts
from tests.rollout.tiny import tokenizer as pieces
from tests.training import runs


def tokenizer() -> Any:
    """The one of these tests, able to read texts: a token for each letter."""
    from tokenizers import Regex, models, pre_tokenizers

    made = pieces()
    backend = made.backend_tokenizer
    backend.model = models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<pad>")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return made


class Guess(MultiTurn):
    """Guess a letter: each wrong guess is answered by "a", the right one ends it. Reward 1 for the right one.

    This is the whole of a user's environment; in a config:

        environment:
          _target_: my_module.Guess
          max_turns: 2
    """

    fills = ("reward", "guesses")

    def start(self, group: Group) -> dict[str, Any]:
        return {"wanted": group.extra.get("letter", "d"), "guesses": 0}

    def reply(self, state: dict[str, Any], text: str) -> tuple[str | None, float]:
        state["guesses"] += 1
        return (None, 1.0) if text.strip() == state["wanted"] else ("a", 0.0)

    def columns(self, state: dict[str, Any]) -> dict[str, float]:
        return {"guesses": state["guesses"]}


NO_LIMIT = SimpleNamespace(model=SimpleNamespace(max_length=None))
"""What an environment reads of a policy."""


class Chatter(MultiTurn):
    """Says something for ever."""

    def start(self, group: Group) -> list[str]:
        return []

    def reply(self, state: list[str], text: str) -> tuple[str | None, float]:
        state.append(text)
        return "abc"[len(state) % 3], float(len(state))


@pytest.fixture(scope="module")
def llama() -> PackedModel:
    return PackedModel(network("llama"), tokenizer())


@pytest.fixture(scope="module")
def uniform() -> PackedModel:
    """A policy that writes d, e or f, each as likely as the others, whatever was before."""
    net = Scripted({})
    net.table = torch.full((len(PIECES), len(PIECES)), -1e9)
    net.table[:, ids("d|e|f")] = 0.0
    return PackedModel(net, tokenizer())


def play(environment: MultiTurn, packed: PackedModel, groups: Sequence[Group], n: int, **settings: Any) -> list[Group]:
    environment.bind(Policy(packed), packed.tokenizer)
    return environment.rollout(LocalRollout(**settings).sampler(packed), groups, n, 3)


# ---------------------------------------------------------------------- what a response is


def test_a_conversation_token_by_token() -> None:
    """The policy says "b" to the prompt "a" and "d" to anything else: the third turn is the last one."""

    class Third(Chatter):
        def reply(self, state: list[str], text: str) -> tuple[str | None, float]:
            said, reward = super().reply(state, text)
            return (None if len(state) == 3 else said), reward

    packed = PackedModel(Scripted({"a": "b", "b": "d", "c": "d"}), tokenizer())
    environment = Third()
    assert isinstance(environment, Environment) and isinstance(environment, NeedsPolicy | Reports)
    (group,) = play(
        environment, packed, [Group(ids("a"), origin="f:1", prompt="a")], 1, max_new_tokens=1, temperature=0
    )
    (response,) = group.responses
    assert group.prompt_ids == ids("a") and group.origin == "f:1"
    assert response.token_ids == ids("b|b|d|c|d")
    assert response.loss_mask == [True, False, True, False, True]
    assert list(response.columns["behaviour_logp"]) == [0.0] * 3
    assert (sorted(response.columns), response.columns["reward"]) == (["behaviour_logp", "reward"], 3.0)
    assert response.finished and response.source == "policy" and response.text == "bbdcd"
    assert environment.report == {"environment_turns": 3.0, "environment_over": 1.0}


def test_log_probs_are_those_of_the_whole_sequence_where_the_policy_wrote(llama: PackedModel) -> None:
    sampler = LocalRollout(max_new_tokens=4).sampler(llama)
    environment = Chatter(max_turns=3)
    environment.bind(Policy(llama), llama.tokenizer)
    given = prompts(3, 9)
    found = environment.rollout(sampler, given, 3, 0)
    assert [(g.prompt_ids, g.origin) for g in found] == [(g.prompt_ids, g.origin) for g in given]
    for group in found:
        for response in group.responses:
            expected = plain_logp(llama.network, group.prompt_ids, response.token_ids)
            own = [expected[i] for i in response.predicted]
            assert response.columns["behaviour_logp"] == pytest.approx(own, abs=1e-4)
            assert response.loss_mask is not None and response.loss_mask.count(False) == 2
            assert response.loss_mask[0] and response.loss_mask[-1], "nothing is said to a policy that has no turn left"
            assert not response.finished, "it was max_turns that ended it"
    assert sampler.generated_tokens == sum(r.loss_tokens for g in found for r in g.responses)


def test_responses_differ_and_depend_on_the_prompt_and_the_sample_alone(llama: PackedModel) -> None:
    given = [*prompts(3, 9, 5), prompts(3)[0]]  # the first comes twice

    def tokens(groups: Sequence[Group]) -> list[list[list[int]]]:
        found = play(Chatter(max_turns=3), llama, groups, 4, max_new_tokens=3)
        return [[r.token_ids for r in g.responses] for g in found]

    together = tokens(given)
    assert all(len({tuple(t) for t in some}) > 1 for some in together) and together[0] != together[3]
    assert [tokens([g])[0] for g in given[:3]] == together[:3]


def test_a_conversation_ends_where_the_model_s_positions_end(llama: PackedModel) -> None:
    (group,) = play(Chatter(max_turns=99), llama, prompts(50), 2, max_new_tokens=5, suppress_tokens=[EOS])
    for response in group.responses:
        assert 50 + len(response.token_ids) <= 64 and len(response.token_ids) >= 9
        assert not response.finished and response.loss_mask is not None and response.loss_mask[-1]


def test_a_guess_is_right_as_often_as_it_must_be(uniform: PackedModel) -> None:
    """Within two of three letters, with replacement: 1 - (2/3)²; 1 + 2/3 guesses on average."""
    groups = [Group(ids("a"), origin="f:1", extra={"letter": x}) for x in "def"]
    found = play(Guess(max_turns=2), uniform, groups, 600, max_new_tokens=1)
    responses = [r for g in found for r in g.responses]
    mean = {c: sum(float(r.columns[c]) for r in responses) / 1800 for c in ("reward", "guesses")}  # type: ignore[arg-type]
    assert mean["reward"] == pytest.approx(5 / 9, abs=4 * (5 / 9 * 4 / 9 / 1800) ** 0.5)
    assert mean["guesses"] == pytest.approx(5 / 3, abs=4 * (2 / 9 / 1800) ** 0.5)
    for response in responses:
        assert response.finished == (response.columns["reward"] == 1.0)
        guesses = int(response.columns["guesses"])  # type: ignore[arg-type]
        assert response.token_ids[1::2] == ids("a") * (guesses - 1)
        assert response.loss_mask == (None if guesses == 1 else [True, False, True])


# ---------------------------------------------------------------------- chat templates


class Written:
    """A sampler that writes down what is asked and says what was written before, with the template's end token."""

    def __init__(self, tokenizer: Any, *turns: str, ended: bool = True) -> None:
        self.tokenizer, self.turns, self.ended = tokenizer, list(turns), ended
        self.generated_tokens = 0
        self.asked: list[list[int]] = []

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        self.asked += [g.prompt_ids for g in groups]
        text = self.turns.pop(0)
        tokens = self.tokenizer(text + ("<|im_end|>" if self.ended else ""), add_special_tokens=False)["input_ids"]
        response = Response(tokens, columns={"behaviour_logp": [-1.0] * len(tokens)}, finished=self.ended, text=text)
        return [g.with_responses([response]) for g in groups]


@pytest.fixture
def chat() -> Any:
    """A byte-level tokenizer with a template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize("ended", [True, False])
def test_answers_are_written_as_the_chat_template_would(chat: Any, ended: bool) -> None:
    """The context of each turn is, token by token, the conversation so far as the template renders it."""
    turns = [{"role": "user", "content": "hi"}]
    template = ChatTemplate.choose(chat, "tokenizer")
    start = chat(template.prompt(turns), add_special_tokens=False)["input_ids"]
    sampler = Written(chat, "one", "two", "three", ended=ended)
    environment = Chatter(max_turns=3, role="user")
    environment.bind(NO_LIMIT, chat)
    (group,) = environment.rollout(sampler, [Group(start, origin="f:1")], 1, 0)
    for asked, said, answer in zip(sampler.asked[1:], ("one", "two"), "bc", strict=True):
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": answer}]
        assert asked == chat(template.prompt(turns), add_special_tokens=False)["input_ids"]
    (response,) = group.responses
    written = chat.decode([response.token_ids[i] for i in response.predicted])
    assert written == ("one<|im_end|>two<|im_end|>three<|im_end|>" if ended else "onetwothree")


def test_prompts_that_are_no_chat_are_answered_in_plain_text(chat: Any) -> None:
    sampler = Written(chat, "one", "two")
    environment = Chatter(max_turns=2)
    environment.bind(NO_LIMIT, chat)
    start = chat("Say something:", add_special_tokens=False)["input_ids"]
    (group,) = environment.rollout(sampler, [Group(start, origin="f:1")], 1, 0)
    assert chat.decode(group.responses[0].token_ids) == "one<|im_end|>btwo<|im_end|>"
    assert group.responses[0].text == "onebtwo"


# ---------------------------------------------------------------------- in the commands


def config(command: str, folder: Path, *more: str) -> dict[str, Any]:
    here = ["+environment._target_=tests.rollout.test_environment.Guess", "+environment.max_turns=3"]
    data = [f"model={folder}/base", "data=prompts", f"data.path={folder}/prompts.jsonl", "rollout.max_new_tokens=2"]
    return resolve(compose(command, [*data, *here, f"out={folder}/{command}", *more]))


def test_sampling_and_training_in_an_environment(tmp_path: Path) -> None:
    """Its own reward: no scorer. The policy learns to say the letter at once."""
    runs.prepare(tmp_path)
    made = produce(config("sample", tmp_path, "group_size=2"), tmp_path / "sample")
    lines = [json.loads(line) for line in (tmp_path / "sample" / "groups.jsonl").read_text().splitlines()]
    responses = [r for line in lines for r in line["responses"]]
    assert made["groups"] == 12 and len(responses) == 24
    assert all({"reward", "guesses"} <= set(r["columns"]) for r in responses)
    assert made["generated_tokens"] == sum(sum(r.get("loss_mask") or [1] * len(r["token_ids"])) for r in responses)

    from alignlab.training.run import train

    words = ["algorithm=grpo", "source=rollout", "source.group_size=8", "training.batch_size=12", "training.steps=30"]
    words += ["training.epochs=null", "training.progress=off", "optimizer.lr=0.02"]
    train(config("train", tmp_path, *words), tmp_path / "train")
    rewards = [line["reward"] for line in runs.metrics(tmp_path, "train")]
    assert sum(rewards[-3:]) / 3 > 0.5 + rewards[0]


# ---------------------------------------------------------------------- what is refused


def test_failures_name_the_record(llama: PackedModel) -> None:
    class Failing(Chatter):
        def reply(self, state: list[str], text: str) -> tuple[str | None, float]:
            raise KeyError("answer")

    with pytest.raises(AlignlabError, match=r"^prompts\.jsonl:1: .*Failing\.reply failed: KeyError: 'answer'"):
        play(Failing(), llama, prompts(3), 1)

    class Curt(Chatter):
        def reply(self, state: list[str], text: str) -> Any:
            return None

    with pytest.raises(AlignlabError, match=r"^prompts\.jsonl:1: .*Curt\.reply returned None: cannot unpack"):
        play(Curt(), llama, prompts(3), 1)

    class Forgetful(Chatter):
        fills = ("reward", "score")

    with pytest.raises(AlignlabError, match=r"Forgetful\.columns: gives no score, which is in fills"):
        play(Forgetful(max_turns=1), llama, prompts(3), 1)
    with pytest.raises(AlignlabError, match="call bind"):
        Chatter().rollout(LocalRollout().sampler(llama), prompts(3), 1, 0)
    with pytest.raises(ConfigError, match=r"environment\.max_turns=0"):
        Chatter(max_turns=0)
    with pytest.raises(ConfigError, match=r"not a Environment: it has no fills, rollout"):
        build_environment({"_target_": "collections.Counter"})
