"""Responses from a model in this process."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from alignlab.core import ConfigError, DataError, Group, NonFiniteError, Response
from alignlab.core.memory import in_halves
from alignlab.data.progress import progress
from alignlab.models import PackedModel, evaluating
from alignlab.rollout.decoding import Decoding, decoding_mode
from alignlab.rollout.sampling import draw, filtered_log_probs, stream_key, uniforms
from alignlab.rollout.settings import RolloutSettings
from alignlab.rollout.stopping import Stopping

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Row:
    """A response being drawn; one with tokens is gone on with.

    Attributes:
        key, sample: which random numbers are its own.
        limit: the most tokens it may have.
        begun: how many tokens it had when drawing was last begun.
    """

    prompt: list[int]
    origin: str
    key: bytes
    sample: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    begun: int = 0

    @property
    def context(self) -> list[int]:
        """What the next token is predicted from."""
        return self.prompt + self.tokens if self.tokens else self.prompt

    @property
    def final_length(self) -> int:
        return len(self.prompt) + self.limit

    def response(self) -> Response:
        columns: dict[str, float | list[float]] = {"behaviour_logp": self.logp}
        return Response(self.tokens, columns=columns, finished=self.finished, text=self.text, source="policy")


class LocalEngine:
    """A `Sampler` on a `PackedModel`: one prefill per prompt, rows that end leave the batch.

    A response depends on the seed, the prompt (its tokens, and the file name and line of its origin) and the index of
    the sample: number t of its uniforms is a hash of these and t, and a token is the uniform's quantile. Batches,
    their order, the token budget and the number of processes change nothing, up to rounding of the logits. A group
    that occurs again in a call, same prompt and origin, goes on where the samples of the last occurrence end:
    two occurrences with n samples are one with 2n. (In another process it would start from 0 again, so records need
    origins of their own.)

    Args:
        progress: show a bar, on a terminal, for what takes over two seconds.

    Attributes:
        generated_tokens: response tokens drawn so far.
    """

    def __init__(self, model: PackedModel, settings: RolloutSettings, progress: bool = True) -> None:
        if model.kind != "policy":
            raise ConfigError(f"rollout: responses come from a language model, this is a {model.kind} model")
        self.model = model
        self.settings = settings
        self.generated_tokens = 0
        self._progress = progress
        self._stopping = Stopping(model, settings)

    def sample(self, groups: Sequence[Group], n: int, seed: int) -> list[Group]:
        """For each group, in order, the same prompt with n new responses from the policy.

        Returns:
            Groups whose responses have `behaviour_logp`, one value in nats for each token, under the distribution
            drawn from (after temperature and filters; 0 throughout when greedy); `finished` is False where a limit
            cut the response.

        Raises:
            DataError: for a prompt that leaves no room for a token in the model's positions, or an empty one.
            NonFiniteError: where the model's logits are NaN or infinite.
        """
        return self._sample(groups, n, seed, self.settings)

    def greedy(self, groups: Sequence[Group]) -> list[Group]:
        """For each group, the response made of the most probable tokens."""
        return self._sample(groups, 1, 0, self.settings.model_copy(update={"temperature": 0.0}))

    def _sample(self, groups: Sequence[Group], n: int, seed: int, settings: RolloutSettings) -> list[Group]:
        rows = self.rows(groups, n, seed)
        self.draw(rows, settings=settings)
        return [g.with_responses([r.response() for r in rows[i * n : (i + 1) * n]]) for i, g in enumerate(groups)]

    def draw(
        self, rows: Sequence[Row], until: Callable[[Row], bool] | None = None, settings: RolloutSettings | None = None
    ) -> None:
        """Go on with rows, in place, each until it ends, or until `until` is true of it after another token.

        Drawn in one go or in several, a row gets the same tokens.
        """
        for row in rows:
            row.begun = len(row.tokens)
        with torch.no_grad(), evaluating(self.model):
            ended = self._draw(rows, settings or self.settings, until)
            for _ in progress(ended, "generating", len(rows)) if self._progress else ended:
                pass
        self.generated_tokens += sum(len(row.tokens) - row.begun for row in rows)

    def rows(self, groups: Sequence[Group], n: int, seed: int) -> list[Row]:
        """n rows for each group, in order, without tokens yet.

        Raises:
            DataError: as `sample` does.
        """
        if n < 1:
            raise ConfigError(f"rollout: n={n} responses per prompt; at least 1 is needed")
        most, positions = self.settings.max_new_tokens, self.model.max_length
        occurrences: Counter[bytes] = Counter()
        rows: list[Row] = []
        shortened = 0
        for group in groups:
            length = len(group.prompt_ids)
            if not length:
                raise DataError(f"{group.origin or 'a group'}: the prompt has no tokens")
            room = most if positions is None else min(most, positions - length)
            if room < 1:
                raise DataError(
                    f"{group.origin or 'a group'}: the prompt has {length} tokens and the model knows {positions} "
                    "positions: no room for a response. Leave such prompts out or shorten them"
                )
            shortened += room < most
            key = stream_key(seed, group.origin, group.prompt_ids)
            first = n * occurrences[key]
            occurrences[key] += 1
            rows += [Row(group.prompt_ids, group.origin, key, first + k, room) for k in range(n)]
        if shortened:
            log.warning(
                "%d of %d prompts leave less room than max_new_tokens=%d in the model's %d positions: "
                "their responses end where the positions end",
                *(shortened, len(groups), most, positions),
            )
        return rows

    def _draw(
        self, rows: Sequence[Row], settings: RolloutSettings, until: Callable[[Row], bool] | None
    ) -> Iterator[Row]:
        """Fill the rows in; yields each when it has ended or pauses."""
        mode = decoding_mode(self.model)
        done: set[int] = set()

        def decode(batch: list[Row]) -> Iterator[Row]:
            # Rows that had ended when memory ran out are left alone; the others go on where they are.
            if going := [row for row in batch if id(row) not in done]:
                for row in self._decode(going, settings, mode.cached, until):
                    done.add(id(row))
                    yield row

        yield from in_halves(self._batches(rows, mode.padded), decode, "sampling")

    def _batches(self, rows: Sequence[Row], padded: bool) -> Iterator[list[Row]]:
        """Rows in batches of at most `token_budget` tokens when all reach their limit, or of one row.

        Like lengths together, the longest first; the rows of one prompt are parted only where a batch cannot hold
        them all.
        """
        contexts = sorted(((row.context, i) for i, row in enumerate(rows)), key=lambda c: (-len(c[0]), c[0]))
        batch: list[Row] = []
        room = length = 0
        for context, same in groupby(contexts, key=lambda c: c[0]):
            unit = [rows[i] for _, i in same]
            mixed = bool(batch) and len(context) != length
            if batch and (len(unit) > room or (mixed and not padded)):
                yield batch
                batch = []
            if not batch:
                length = len(context)
                room = most = max(1, self.settings.token_budget // unit[0].final_length)
                while len(unit) > most:
                    yield unit[:most]
                    unit = unit[most:]
            batch += unit
            room -= len(unit)
        if batch:
            yield batch

    def _decode(
        self, rows: list[Row], settings: RolloutSettings, cached: bool, until: Callable[[Row], bool] | None
    ) -> Iterator[Row]:
        """Draw a batch of rows, those of one context adjacent, to their ends."""
        stopping = self._stopping
        repeats = [(context, len(list(same))) for context, same in groupby(row.context for row in rows)]
        decoding = Decoding(self.model, [context for context, _ in repeats], cached)
        decoding.select([i for i, (_, count) in enumerate(repeats) for _ in range(count)])
        longest = max(row.limit - len(row.tokens) for row in rows)
        uniform_RT = torch.stack(
            [uniforms(row.key, row.sample, len(row.tokens) + longest)[len(row.tokens) :] for row in rows]
        ).to(self.model.device)
        for step in range(longest):
            logits_RV = self._ban(decoding.logits_RV, rows)
            logp_RV = filtered_log_probs(logits_RV, settings)
            token_R = draw(logp_RV, uniform_RT[:, step])
            logp_R = logp_RV.gather(-1, token_R[:, None]).squeeze(-1)
            self._check_finite(logits_RV, rows)
            going = []
            for i, (row, token, logp) in enumerate(zip(rows, token_R.tolist(), logp_R.tolist(), strict=True)):
                row.tokens.append(token)
                row.logp.append(logp)
                text = stopping.ended(row.tokens)
                row.finished = text is not None
                paused = text is None and until is not None and until(row)
                if text is None and not paused and len(row.tokens) < row.limit:
                    going.append(i)
                else:
                    row.text = stopping.text(row.tokens) if text is None else text
                    yield row
            if not going:
                return
            if len(going) < len(rows):  # at once: it copies the cache, as every step does
                rows = [rows[i] for i in going]
                decoding.select(going)
                token_R, uniform_RT = token_R[going], uniform_RT[going]
            decoding.append(token_R)

    def _ban(self, logits_RV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Without the tokens that may not come next; rows that are gone on with may be of different lengths."""
        lengths = [len(row.tokens) for row in rows]
        if min(lengths) == max(lengths) or min(lengths) >= self.settings.min_new_tokens:
            return self._stopping.ban(logits_RV, min(lengths))
        each = [self._stopping.ban(logits_RV[i : i + 1], length) for i, length in enumerate(lengths)]
        return torch.cat(each)

    @staticmethod
    def _check_finite(logits_RV: torch.Tensor, rows: Sequence[Row]) -> None:
        finite = logits_RV.amax(-1).isfinite()
        if not finite.all():
            origins = {row.origin or "a group" for row, good in zip(rows, finite.tolist(), strict=True) if not good}
            raise NonFiniteError(
                f"{', '.join(sorted(origins)[:3])}: the model's logits are not finite numbers. Its weights have "
                "diverged (lower the learning rate), or its precision is too low for it"
            )
