"""Environments of text: the policy writes, something answers, and so on; a tool, a game, a user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from alignlab.core import AlignlabError, ConfigError, Group, Response, Sampler, require
from alignlab.core.example import BadRecord
from alignlab.core.group import numbers
from alignlab.core.parts import finite
from alignlab.data import DataSettings
from alignlab.data.chat import ChatTemplate
from alignlab.data.encode import Encoder
from alignlab.rollout.sampler import SharedSampler
from alignlab.scoring.rules import call

OF_USER, OF_POLICY = "[user's words]", "[policy's words]"
"""Contents of a conversation that is rendered to see what a chat template writes around them."""


@dataclass(slots=True)
class _Conversation:
    """One response in the making.

    Attributes:
        origin: a name of its own, which makes its random numbers its own.
        last: the policy's last turn.
        start: where in `tokens` that turn begins.
        over: whether the environment said that it is over.
    """

    group: Group
    origin: str
    state: Any
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    last: Response = field(default_factory=lambda: Response([]))
    start: int = 0
    turns: int = 0
    reward: float = 0.0
    over: bool = False

    @property
    def context(self) -> list[int]:
        return [*self.group.prompt_ids, *self.tokens]

    def act(self, turn: Response) -> None:
        """Add a turn of the policy."""
        self.last, self.start, self.turns = turn, len(self.tokens), self.turns + 1
        self.tokens += turn.token_ids
        self.mask += [True] * len(turn.token_ids)
        self.logp += [float(x) for x in turn.columns["behaviour_logp"]]  # type: ignore[union-attr]

    def observe(self, tokens: Sequence[int]) -> None:
        """Add what the environment said."""
        self.tokens += tokens
        self.mask += [False] * len(tokens)


def _read(reply: tuple[str | None, float]) -> tuple[str | None, float]:
    """What `MultiTurn.reply` returned, held against what it is to return."""
    said, reward = reply
    if said is not None:
        str(said).encode()  # half a character is none: no tokenizer takes it
    return None if said is None else str(said), finite(reward)


class MultiTurn:
    """Base class of an `Environment` in which it and the policy take turns; a subclass defines `start` and `reply`.

    All conversations go on together, a turn at a time. What the environment says is read, not learnt: those tokens'
    `loss_mask` is False. `rollout.max_new_tokens` and `rollout.stop` are a turn's. A response is `finished` where the
    environment said so, not where `max_turns` or the model's positions ended it.

    Args:
        max_turns: turns of the policy at most, >= 1.
        chat_template: how the environment's answers are written. "auto": as turns of the tokenizer's chat template
            where the prompt ends as that template ends a prompt, else as plain text. None: as plain text. Or
            "tokenizer", "plain", "chatml" or the path of a Jinja file, as in `data.chat_template`.
        role: who speaks there, as the template calls it: "user", "tool".

    Class attributes:
        fills: columns filled: `reward`, and what `columns` returns.
    """

    fills: tuple[str, ...] = ("reward",)

    def __init__(self, max_turns: int = 8, chat_template: str | None = "auto", role: str = "user") -> None:
        require(max_turns >= 1, "environment.max_turns", max_turns, "must be at least 1")
        self.max_turns, self.chat_template, self.role = max_turns, chat_template, role
        self.max_length: int | None = None
        self.tokenizer: Any = None
        self.report: Mapping[str, float] = {}

    # ------------------------------------------------------------------ to be defined

    def start(self, group: Group) -> Any:
        """The state of a new conversation about `group`, which has the prompt's text, and the record's other fields in
        `extra`. Anything; it is only handed to the methods below."""
        raise NotImplementedError(f"{type(self).__name__} does not define start")

    def reply(self, state: Any, text: str) -> tuple[str | None, float]:
        """What the environment says to the policy's `text` (without stop string and special tokens), or None where the
        conversation is over; and the reward of the conversation so far. The last one counts. `state` may be changed."""
        raise NotImplementedError(f"{type(self).__name__} does not define reply")

    def columns(self, state: Any) -> Mapping[str, float]:
        """Other columns of a response whose conversation has ended; their names belong in `fills`."""
        return {}

    # ------------------------------------------------------------------ what it makes of them

    def bind(self, policy: Any, tokenizer: Any) -> None:
        """See `alignlab.core.NeedsPolicy`."""
        self.max_length, self.tokenizer = policy.model.max_length, tokenizer

    def rollout(self, sampler: Sampler, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """See `alignlab.core.Environment.rollout`.

        Raises:
            AlignlabError: the subclass's code failed, with the record it failed on.
        """
        if self.tokenizer is None:
            raise AlignlabError(f"{type(self).__name__}.rollout: call bind(policy, tokenizer) first")
        with sampler.together() if isinstance(sampler, SharedSampler) else nullcontext():
            first = sampler.sample(groups, n, seed)
            conversations = [self._begin(g, k) for g in groups for k in range(n)]
            for conversation, turn in zip(conversations, (r for g in first for r in g.responses), strict=True):
                conversation.act(turn)
            live = [c for c in conversations if self._answer(c)]
            while live:
                asked = [Group(c.context, [], c.origin, c.group.prompt) for c in live]
                for conversation, drawn in zip(live, sampler.sample(asked, 1, seed), strict=True):
                    conversation.act(drawn.responses[0])
                live = [c for c in live if self._answer(c)]
        count = max(1, len(conversations))
        self.report = {
            "environment_turns": sum(c.turns for c in conversations) / count,
            "environment_over": sum(c.over for c in conversations) / count,
        }
        responses = [self._response(c) for c in conversations]
        return [g.with_responses(responses[i * n : (i + 1) * n]) for i, g in enumerate(groups)]

    def _begin(self, group: Group, sample: int) -> _Conversation:
        state = call(self.start, lambda state: state, group, group)
        return _Conversation(group, f"{group.origin} sample {sample}", state)

    def _answer(self, conversation: _Conversation) -> bool:
        """Answer the policy's last turn. Whether the policy has another one."""
        c = conversation
        said, c.reward = call(self.reply, _read, c.group, c.state, c.last.text)
        c.over = said is None
        if said is None or c.turns == self.max_turns:
            return False
        tokens = self._encode(c, said)
        if self.max_length is not None and len(c.context) + len(tokens) >= self.max_length:
            return False
        c.observe(tokens)
        return True

    def _response(self, conversation: _Conversation) -> Response:
        c = conversation
        before = self.tokenizer.decode(c.tokens[: c.start], skip_special_tokens=True)
        columns: dict[str, Any] = {"behaviour_logp": numbers(c.logp), "reward": float(c.reward)}
        columns |= call(self.columns, lambda found: {n: finite(v) for n, v in found.items()}, c.group, c.state)
        if missing := sorted(set(self.fills) - set(columns)):
            raise AlignlabError(f"{type(self).__name__}.columns: gives no {', '.join(missing)}, which is in fills")
        mask = None if all(c.mask) else c.mask
        return Response(c.tokens, mask, columns, c.over, f"{before}{c.last.text}", "policy")

    # ------------------------------------------------------------------ how answers are written

    def _encode(self, conversation: _Conversation, said: str) -> list[int]:
        """Tokens of an answer, as they would be at inference: what the template writes after the policy's turn, the
        answer, and what asks for the next turn."""
        if self._template is None or not self._in_chat(conversation.group):
            return self._encoder.continuations([said])[0] if said else []
        turns = [{"role": "user", "content": OF_USER}, {"role": "assistant", "content": OF_POLICY}]
        try:
            whole = self._template.prompt([*turns, {"role": self.role, "content": said}])
        except BadRecord as error:
            raise ConfigError(f"environment.role={self.role!r}: {error}") from error
        _, found, text = whole.rpartition(OF_POLICY)
        if not found:
            raise ConfigError("environment.chat_template: the template does not render earlier turns as they were")
        closed = self.tokenizer.decode([conversation.last.token_ids[-1]]) if conversation.last.finished else ""
        return self._encoder.continuations([text.removeprefix(closed)])[0]

    def _in_chat(self, group: Group) -> bool:
        """Whether the prompt was written by the template."""
        if self.chat_template != "auto":
            return True
        ending = self._ending
        return bool(self.tokenizer.decode(group.prompt_ids[-len(ending) - 1 :]).endswith(ending))

    @cached_property
    def _template(self) -> ChatTemplate | None:
        if self.chat_template is None or (self.chat_template == "auto" and not self.tokenizer.chat_template):
            return None
        return ChatTemplate.choose(self.tokenizer, self.chat_template)

    @cached_property
    def _ending(self) -> str:
        """What the template writes after a user's words to ask for an answer."""
        assert self._template is not None
        return self._template.prompt([{"role": "user", "content": OF_USER}]).rpartition(OF_USER)[2]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, DataSettings())
