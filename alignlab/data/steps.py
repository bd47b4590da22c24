"""Where the steps of a solution end: the one definition, for training data, scorers and search alike.

A step ends at the token that completes the separator after it. The last one, which has no separator, ends at the last
token of the response. Where the model reads a token of its own after each step (`step_token`), it ends at that token.
A token may hold more than the separator (".\\n", "\\nSo"): it is the one that completes it that counts. What is blank
between two separators is no step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from alignlab.core.errors import ConfigError
from alignlab.core.example import BadRecord
from alignlab.core.group import Response, is_per_token, numbers

CONTEXT = 8
"""Tokens decoded before those that matter, for tokenizers that write a token by what stands before it."""


def label_steps(response: Response, ends: Sequence[int], labels: Sequence[float]) -> None:
    """Make a response one whose steps are to be learned: the ends of its steps bear loss, `step_label` is theirs.

    In place; of other columns with a value for each token the values at these tokens are kept.
    """
    place = {token: i for i, token in enumerate(response.predicted)}
    for name, column in list(response.columns.items()):
        if is_per_token(column):
            if all(end in place for end in ends):
                response.columns[name] = numbers([column[place[end]] for end in ends])  # type: ignore[index]
            else:
                del response.columns[name]
    chosen = set(ends)
    response.loss_mask = [i in chosen for i in range(len(response.token_ids))]
    response.columns["step_label"] = numbers(labels)


class Steps:
    """The steps of one tokenizer's responses.

    Args:
        separator: text between two steps; "" makes every token but an end token a step.
        token: text of the one token put after each step, before the separator; None: there is none.

    Raises:
        ConfigError: the tokenizer has no such token.
    """

    def __init__(self, tokenizer: Any, separator: str = "\n", token: str | None = None) -> None:
        self.tokenizer, self.separator, self.token = tokenizer, separator, token
        self.token_id = None if token is None else self._id(token)
        special = {i for i in tokenizer.all_special_ids if str(tokenizer.convert_ids_to_tokens(i)) not in separator}
        self._special = special - {self.token_id, tokenizer.unk_token_id}

    def ends(self, token_ids: Sequence[int]) -> list[int]:
        """Index of the last token of each step, ascending; at least one, the last token where nothing else ends one."""
        ids = list(token_ids)
        last = len(ids) - 1
        if self.token_id is not None:
            return [i for i, token in enumerate(ids) if token == self.token_id] or [last]
        words = len(ids)
        while words and ids[words - 1] in self._special:
            words -= 1
        if not self.separator:
            return [i for i, token in enumerate(ids) if token not in self._special] or [last]
        text = self._text(ids[:words])
        cuts, rest = self._cuts(text)
        found = self._places(ids[:words], text, cuts)
        if (rest.strip() or not found) and found[-1:] != [last]:
            found.append(last)
        return found

    def completes(self, token_ids: Sequence[int], start: int) -> bool:
        """Whether the last of the tokens ends the step that begins at index `start`, by a separator or step token."""
        if self.token_id is not None:
            return token_ids[-1] == self.token_id
        if not self.separator:
            return token_ids[-1] not in self._special
        return bool(self._cuts(self._text(token_ids[start:]))[0])

    def join(self, steps: Sequence[str]) -> str:
        """The text of a solution.

        Raises:
            BadRecord: a step holds the separator, and no step token tells where it ends.
        """
        bare = [self._bare(step) for step in steps]
        for i, step in enumerate(bare):
            if self.token is None and self.separator and self.separator in step:
                raise BadRecord(
                    f"steps[{i}] has {self.separator!r} in it, which parts the steps: choose another "
                    "data.step_separator, or mark their ends by a data.step_token"
                )
        return self.separator.join(f"{step}{self.token or ''}" for step in bare)

    def split(self, token_ids: Sequence[int]) -> list[str]:
        """The texts of the steps, without separators, step tokens and special tokens; one for each of `ends`."""
        ends = self.ends(token_ids)
        starts = [0, *(end + 1 for end in ends[:-1])]
        pieces = [token_ids[a : b + 1] for a, b in zip(starts, ends, strict=True)]
        texts = [self._text([t for t in piece if t not in self._special and t != self.token_id]) for piece in pieces]
        return [self._bare(text) for text in texts]

    def by_token(self, response: Response) -> bool:
        """Whether the response has the step token."""
        return self.token_id is not None and self.token_id in response.token_ids

    def _bare(self, step: str) -> str:
        """Without separators around it."""
        while self.separator and step.startswith(self.separator):
            step = step[len(self.separator) :]
        while self.separator and step.endswith(self.separator):
            step = step[: -len(self.separator)]
        return step

    def _cuts(self, text: str) -> tuple[list[int], str]:
        """Where in the text each separator that ends a step ends, and what is left behind the last separator."""
        cuts, start = [], 0
        while (place := text.find(self.separator, start)) >= 0:
            step, start = text[start:place], place + len(self.separator)
            if step.strip():
                cuts.append(start)
        return cuts, text[start:]

    def _places(self, ids: list[int], text: str, cuts: Sequence[int]) -> list[int]:
        """Index of the first token up to which the tokens hold all of `text[:cut]`, for each cut; each index once.

        Only the tokens since the last cut are decoded, behind a few others; where a part does not decode as it does
        within the whole, all are.
        """
        found: list[int] = []
        start = read = 0  # the tokens before `start` make the first `read` characters
        for cut in cuts:
            if cut <= read:  # the token that ended the last step ends this one too
                continue
            place = None
            for near in (max(0, start - CONTEXT), 0):
                read = read if near else len(self._text(ids[:start]))
                known = len(self._text(ids[near:start]))

                def holds(i: int, near: int = near, known: int = known, read: int = read, cut: int = cut) -> bool:
                    return self._text(ids[near : i + 1])[known : known + cut - read] == text[read:cut]

                size = 1
                while start + size < len(ids) and not holds(start + size - 1):
                    size *= 2
                place = start + bisect_left(range(start, min(start + size, len(ids))), True, key=holds)
                if place < len(ids):
                    break
            place = min(place or 0, len(ids) - 1)
            found.append(place)
            start, read = place + 1, read + len(self._text(ids[near : place + 1])) - known
        return found

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _id(self, token: str) -> int:
        vocabulary = self.tokenizer.get_vocab()
        if token in vocabulary:
            return int(vocabulary[token])
        *before, last = self.tokenizer(token, add_special_tokens=False)["input_ids"] or [self.tokenizer.unk_token_id]
        if last == self.tokenizer.unk_token_id or self.tokenizer.decode(before).strip():
            raise ConfigError(f"step_token={token!r}: is no single token of this tokenizer")
        return int(last)
