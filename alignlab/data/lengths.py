"""Length limits. A group is cut in place; what was done to it comes back as sentences for the report."""

from __future__ import annotations

from collections.abc import Iterator

from alignlab.core.errors import DataError
from alignlab.core.group import Group, Response, is_per_token
from alignlab.data.settings import DataSettings


def cut_prompt(ids: list[int], limit: int, settings: DataSettings, bos: int | None) -> list[int]:
    """At most `limit` tokens of a prompt: its end or its start as `keep_prompt` says. A beginning-of-sequence token
    stays, since models are at a loss without the one they were trained with."""
    if len(ids) <= limit:
        return ids
    if settings.keep_prompt == "start":
        return ids[:limit]
    if ids[0] == bos and limit > 1:
        return ids[:1] + ids[len(ids) - limit + 1 :]
    return ids[len(ids) - limit :]


def fit(group: Group, settings: DataSettings, bos: int | None) -> list[str]:
    """Cut a group to the limits of the settings.

    A prompt is cut to `max_prompt_length`, a response to `max_response_length`. If prompt and longest response are then
    more than `max_length` together, each keeps at least half of it: the prompt is cut to what the response leaves over
    or half, whichever is more, and the responses to the rest. A response that is cut loses its end token and is
    unfinished.

    Returns:
        What was done, or would have to be done where `too_long` is "drop"; empty if the group fits.

    Raises:
        DataError: it does not fit and `too_long` is "error".
    """
    length = len(group.prompt_ids)
    longest = max((len(r.token_ids) for r in group.responses), default=0)
    prompt_limit = min(length, settings.max_prompt_length or length)
    response_limit = min(longest, settings.max_response_length or longest)
    done = []
    if prompt_limit < length:
        done.append(f"prompt cut to max_prompt_length ({settings.keep_prompt} kept)")
    if response_limit < longest:
        done.append("response cut to max_response_length")
    total = settings.max_length
    if total is not None and prompt_limit + response_limit > total:
        room = max(total - response_limit, total // 2)
        if room < prompt_limit:
            done.append(f"prompt cut to fit max_length ({settings.keep_prompt} kept)")
        prompt_limit = min(prompt_limit, room)
        if total - prompt_limit < response_limit:
            done.append("response cut to fit max_length")
        response_limit = min(response_limit, total - prompt_limit)
    if done and settings.too_long == "error":
        raise DataError(
            f"{group.origin}: the prompt has {length} tokens, the longest response {longest}, which is too long "
            f"({'; '.join(done)}); raise the limits, or set data.too_long to truncate or drop"
        )
    if done and settings.too_long == "truncate":
        group.prompt_ids = cut_prompt(group.prompt_ids, prompt_limit, settings, bos)
        for response in group.responses:
            _cut_response(response, response_limit)
    return done


def _cut_response(response: Response, limit: int) -> None:
    if len(response.token_ids) <= limit:
        return
    response.token_ids = response.token_ids[:limit]
    if response.loss_mask is not None:
        response.loss_mask = response.loss_mask[:limit]
    response.columns = {
        name: value[: response.loss_tokens] if is_per_token(value) else value  # type: ignore[index]
        for name, value in response.columns.items()
    }
    response.finished = False


def pieces(ids: list[int], bos: int | None, settings: DataSettings) -> Iterator[tuple[list[int], list[int]]]:
    """A document as (prompt, response) pairs, each within the limits; every token after the first is in one response.

    Args:
        ids: the document, with `bos` at its head if the tokenizer has one.
        bos: what every piece begins with; None to begin with the token before.
    """
    limits = [settings.max_length, settings.max_response_length and settings.max_response_length + 1]
    length = min((limit for limit in limits if limit), default=len(ids)) if settings.chunk else len(ids)
    for start in range(1, len(ids), max(length - 1, 1)):
        head = ids[start - 1] if bos is None else bos
        yield [head], ids[start : start + max(length - 1, 1)]
