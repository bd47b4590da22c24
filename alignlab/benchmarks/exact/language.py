"""A language so small that every completion of every prompt can be listed, with a reward that is known.

Axes: `_X` prompts, `_Y` completions, `_V` words, `_N` any list of completions, `_L` places of a completion.

A completion is a sequence of 0 to L - 1 words ended by the end token, or L words, where the limit ends it. With 11
words and L = 4 that makes 1 + 11 + 121 + 1331 + 14641 = 16,105 for each prompt. The model's vocabulary is exactly the
words and the end token, so nothing else can ever be sampled and the probabilities of the completions sum to 1; the end
token therefore serves as padding too, as it does for most models that were made without a padding token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from alignlab.core.errors import DataError, require
from alignlab.core.group import Group
from alignlab.core.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

WORDS = (
    *("the", "fox", "sees", "a", "red", "bird", "near", "cold", "water", "at", "night"),
    *("and", "wind", "sings", "while", "old", "trees", "sleep", "under", "snow"),
)
END = "<end>"

LIKING, PAIRING, LENGTH = 0.5, 0.3, 0.2
"""Weights of the three parts of the reward; they sum to 1."""
LENGTHS_WANTED = (4, 2, 3)
"""The length that prompt x wants, in words: entry x mod 3, at most L."""
FAVOURITES = 0.3
"""Share of the words that each word would like to be followed by."""


class ExactWorldSettings(Settings):
    """Which language. Every table is drawn from `seed`, the same on every machine."""

    words: int = Field(11, ge=2, le=len(WORDS))
    max_tokens: int = Field(4, ge=1, le=6)
    prompts: int = Field(6, ge=1, le=100)
    seed: int = Field(0, ge=0)


class ExactWorld:
    """The language: its prompts, its completions, its reward.

    Token i < V is word i, token V is the end token. A prompt is two different words. Completions are numbered by
    length, then lexicographically; `words_YL` lists them. Tensors are on the CPU, rewards in float64.

    Attributes:
        V: number of words; also the id of the end token.
        L: longest completion, in words.
        X: number of prompts.
        Y: number of completions of each prompt.
        prompt_ids: the prompts, X lists of token ids.
    """

    def __init__(self, settings: ExactWorldSettings | None = None) -> None:
        self.settings = settings or ExactWorldSettings()
        self.V, self.L, self.X = self.settings.words, self.settings.max_tokens, self.settings.prompts
        self.Y = sum(self.V**length for length in range(self.L + 1))
        require(self.Y <= 2_000_000, "words", self.V, f"{self.Y:,} completions are too many to list; lower max_tokens")
        pairs = [[first, second] for first in range(self.V) for second in range(self.V) if first != second]
        require(len(pairs) >= self.X, "prompts", self.X, f"{self.V} words make only {len(pairs)} prompts")
        self.prompt_ids = self._shuffled("prompts", pairs)[: self.X]
        self._prompt_index = {tuple(ids): x for x, ids in enumerate(self.prompt_ids)}

    def random(self, purpose: str) -> random.Random:
        """The source of one table. Only its `random()` may be used: Python promises to keep that sequence for ever."""
        return random.Random(f"{self.settings.seed}/{purpose}")

    def _shuffled(self, purpose: str, items: list[T]) -> list[T]:
        rng = self.random(purpose)
        return sorted(items, key=lambda _: rng.random())

    # Prompts and completions

    @property
    def end_id(self) -> int:
        """The end token, which is the padding token as well."""
        return self.V

    @property
    def prompt_texts(self) -> list[str]:
        """The prompts as text, e.g. `"red fox"`."""
        return [self.text(ids) for ids in self.prompt_ids]

    def prompt_index(self, prompt_ids: list[int], origin: str = "") -> int:
        """The number x of a prompt. Raises DataError where it is none of this language's."""
        x = self._prompt_index.get(tuple(prompt_ids))
        if x is None:
            raise DataError(
                f"{origin or 'a group'}: token ids {prompt_ids} are none of the {self.X} prompts of the exact "
                "benchmark; use its own prompts and tokenizer, and no chat template"
            )
        return x

    @cached_property
    def words_YL(self) -> Tensor:
        """All completions as word ids, filled up with the end token, int64, shape (Y, L)."""
        levels = [torch.full((1, self.L), self.end_id)]
        for place in range(self.L):
            last = levels[-1].repeat_interleave(self.V, dim=0)
            last[:, place] = torch.arange(self.V).repeat(len(levels[-1]))
            levels.append(last)
        return torch.cat(levels)

    @cached_property
    def length_Y(self) -> Tensor:
        """Words in each completion, int64, shape (Y,), each in [0, L]."""
        return (self.words_YL != self.end_id).sum(-1)

    def words_of(self, token_ids: list[int], origin: str = "") -> list[int]:
        """The words of a response's tokens, without the end token.

        L words followed by the end token (as text data is usually prepared) count as the L words. Raises DataError
        where the tokens are no completion of this language.
        """
        ended = bool(token_ids) and token_ids[-1] == self.end_id
        words = token_ids[:-1] if ended else token_ids
        if len(words) > self.L or (len(words) < self.L and not ended) or not all(0 <= w < self.V for w in words):
            raise DataError(
                f"{origin or 'a response'}: token ids {token_ids} are no completion of the exact benchmark, which has "
                f"up to {self.L} words below {self.V} and ends shorter ones with {self.end_id}; sample with "
                f"{self.L} new tokens at most and no stop strings"
            )
        return words

    def index(self, token_ids: list[int]) -> int:
        """The number y of a response's tokens, in [0, Y). Raises DataError as `words_of` does."""
        words = self.words_of(token_ids)
        shorter = sum(self.V**length for length in range(len(words)))
        return shorter + sum(word * self.V**place for place, word in enumerate(reversed(words)))

    def token_ids(self, y: int) -> list[int]:
        """The tokens of completion y as a model emits them: L words, or fewer and the end token."""
        words = self.words_YL[y, : int(self.length_Y[y])].tolist()
        return words if len(words) == self.L else [*words, self.end_id]

    def text(self, token_ids: list[int]) -> str:
        """The words, with spaces between them; the end token is left out."""
        return " ".join(WORDS[i] for i in token_ids if i != self.end_id)

    def prompts(self) -> list[dict[str, str]]:
        """The prompts as records `{"prompt"}`."""
        return [{"prompt": text} for text in self.prompt_texts]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer of one token a word. It adds no token of its own; unknown words are an error."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {word: i for i, word in enumerate([*WORDS[: self.V], END])}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            eos_token=END,
            pad_token=END,
            model_max_length=256,
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
        )

    # Reward

    @cached_property
    def likes_XV(self) -> Tensor:
        """How much each prompt likes each word, in [0, 1], float64, shape (X, V).

        Each prompt has its own order of the words; the k-th of them, from 0, is liked (k + u)/V, u uniform in [0, 1).
        """
        rows = []
        for x in range(self.X):
            rng = self.random(f"likes/{x}")
            order = self._shuffled(f"order/{x}", list(range(self.V)))
            rows.append([(k + rng.random()) / self.V for k in order])
        return torch.tensor(rows, dtype=torch.float64)

    @cached_property
    def favoured_VV(self) -> Tensor:
        """1 where the second word is a favourite successor of the first, float64, shape (V, V)."""
        favourites = max(1, round(FAVOURITES * self.V))
        favoured = torch.zeros(self.V, self.V, dtype=torch.float64)
        for first in range(self.V):
            favoured[first, self._shuffled(f"favoured/{first}", list(range(self.V)))[:favourites]] = 1
        return favoured

    @cached_property
    def wanted_X(self) -> Tensor:
        """The length each prompt wants, in words, int64, shape (X,)."""
        return torch.tensor([min(LENGTHS_WANTED[x % len(LENGTHS_WANTED)], self.L) for x in range(self.X)])

    def reward(self, prompt_N: Tensor, words_NL: Tensor) -> Tensor:
        """The reward of each completion, in [0, 1], float64, shape (N,).

        r(x, w_1 … w_n) = 0.5 · liking + 0.3 · pairing + 0.2 · length, where

        * liking is the sum of `likes_XV` over the *different* words of the completion, divided by n: saying a word
          again earns nothing (0 where n = 0);
        * pairing is the share of the n neighbours (w_0, w_1), …, (w_{n-1}, w_n) that are favoured, w_0 being the last
          word of the prompt (0 where n = 0);
        * length is 1 - |n - wanted| / L.

        Rounded to six decimals, so that equal rewards are equal bit for bit.

        Args:
            prompt_N: prompt numbers, int64, shape (N,).
            words_NL: word ids, filled up with the end token, int64, shape (N, L).
        """
        present_NL = words_NL != self.end_id
        n_N = present_NL.sum(-1)
        some_N = n_N.clamp(min=1)
        word_NL = words_NL.where(present_NL, words_NL.new_zeros(()))

        said_NV = torch.zeros(len(words_NL), self.V, dtype=torch.float64)
        said_NV = said_NV.scatter_reduce(1, word_NL, present_NL.double(), "amax")
        liking_N = (said_NV * self.likes_XV[prompt_N]).sum(-1) / some_N

        last_N = torch.tensor([ids[-1] for ids in self.prompt_ids])[prompt_N]
        before_NL = torch.cat([last_N[:, None], word_NL[:, :-1]], dim=1)
        pairing_N = (self.favoured_VV[before_NL, word_NL] * present_NL).sum(-1) / some_N

        length_N = 1 - (n_N - self.wanted_X[prompt_N]).abs() / self.L
        return (LIKING * liking_N + PAIRING * pairing_N + LENGTH * length_N).round(decimals=6)

    @cached_property
    def reward_XY(self) -> Tensor:
        """The reward of every completion of every prompt, float64, shape (X, Y)."""
        everywhere = [self.reward(torch.full((self.Y,), x), self.words_YL) for x in range(self.X)]
        return torch.stack(everywhere)


class ExactReward:
    """Fills `reward` with the true reward, in [0, 1], from the token ids of prompt and response.

    Raises DataError where a prompt or a response is none of the language's.
    """

    fills: tuple[str, ...] = ("reward",)

    def __init__(self, world: ExactWorld) -> None:
        self.world = world

    def score(self, groups: Sequence[Group]) -> None:
        """Set `response.columns["reward"]` for every response of every group."""
        prompts, rows, responses = [], [], []
        for group in groups:
            x = self.world.prompt_index(group.prompt_ids, group.origin)
            for response in group.responses:
                words = self.world.words_of(response.token_ids, group.origin)
                prompts.append(x)
                rows.append(words + [self.world.end_id] * (self.world.L - len(words)))
                responses.append(response)
        if not responses:
            return
        reward_N = self.world.reward(torch.tensor(prompts), torch.tensor(rows))
        for response, reward in zip(responses, reward_N.tolist(), strict=True):
            response.columns["reward"] = reward
