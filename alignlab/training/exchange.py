"""Groups on their way between processes: what there is for each token as few large arrays, the rest as it is.

Every process gets all of an iteration. An algorithm's `prepare` sees whole groups, and each minibatch and epoch shares
them out anew. That takes some 15 bytes a token, far less than the token itself took: see experiments/performance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from alignlab.core import Group, Response
from alignlab.core.group import joined


@dataclass
class Pieces:
    """Arrays of one axis, end to end, and how long each is."""

    flat: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> Pieces:
        flat = np.concatenate(arrays) if len(arrays) else np.zeros(0, np.float32)
        return cls(flat, np.array([*map(len, arrays)], np.int64))

    def apart(self) -> list[np.ndarray]:
        """The arrays, as views."""
        return np.split(self.flat, self.sizes.cumsum()[:-1]) if len(self.sizes) else []


@dataclass
class Parcel:
    """Groups, as `pack` makes them and `unpack` reads them.

    Attributes:
        groups: what there is besides; a prompt that is its record's is left out, and so are tokens, masks and arrays.
        ids: tokens of all responses, in the smallest type that holds them.
        masks: of those responses that have one, by index.
        columns: by the names of columns that share them, arrays of those responses that have them, by index.
    """

    groups: list[Group]
    ids: Pieces
    masks: tuple[list[int], Pieces]
    columns: dict[tuple[str, ...], tuple[list[int], Pieces]]


def pack(groups: Iterable[Group], records: Iterable[Group]) -> Parcel:
    """Args: `records`: what every process has of these groups already."""
    bare: list[Group] = []
    responses: list[Response] = []
    arrays: dict[str, dict[int, np.ndarray]] = {}
    for group, record in zip(groups, records, strict=True):
        known = group.prompt_ids is record.prompt_ids and group.prompt is record.prompt
        kept = []
        for response in group.responses:
            columns = dict(response.columns)
            for name, value in columns.items():
                if isinstance(value, np.ndarray) and value.ndim == 1:
                    arrays.setdefault(name, {})[len(responses)] = value
                    columns[name] = 0.0  # keeps its place
            kept.append(replace(response, token_ids=[], loss_mask=None, columns=columns))
            responses.append(response)
        ids, prompt = ([], "") if known else (group.prompt_ids, group.prompt)
        bare.append(replace(group, responses=kept, prompt_ids=ids, prompt=prompt))
    flat = joined([r.token_ids for r in responses])
    if len(flat) and flat.min() >= 0:
        flat = flat.astype(np.min_scalar_type(flat.max()))
    masks = {i: np.array(r.loss_mask, bool) for i, r in enumerate(responses) if r.loss_mask is not None}
    sharing: dict[str, list[str]] = {}  # old_logp may be the very arrays of behaviour_logp
    for name, held in arrays.items():
        first = next(n for n in arrays if _alike(arrays[n], held))
        sharing.setdefault(first, []).append(name)
    return Parcel(
        bare,
        Pieces(flat, np.array([len(r.token_ids) for r in responses], np.int64)),
        ([*masks], Pieces.of([*masks.values()])),
        {tuple(names): ([*arrays[n]], Pieces.of([*arrays[n].values()])) for n, names in sharing.items()},
    )


def _alike(some: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> bool:
    """Whether they are the very same arrays of the same responses."""
    return some.keys() == others.keys() and all(some[i] is others[i] for i in some)


def unpack(parcel: Parcel, records: Iterable[Group]) -> list[Group]:
    """The groups that were packed, with the prompts of the records where they had them."""
    responses = [r for g in parcel.groups for r in g.responses]
    ids, ends = parcel.ids.flat.tolist(), parcel.ids.sizes.cumsum().tolist()
    for response, begin, end in zip(responses, [0, *ends], ends, strict=False):
        response.token_ids = ids[begin:end]
    for i, mask in zip(parcel.masks[0], parcel.masks[1].apart(), strict=True):
        responses[i].loss_mask = mask.tolist()
    for names, (indices, arrays) in parcel.columns.items():
        for i, array in zip(indices, arrays.apart(), strict=True):
            responses[i].columns.update(dict.fromkeys(names, array))
    return [
        group if group.prompt_ids else replace(group, prompt_ids=record.prompt_ids, prompt=record.prompt)
        for group, record in zip(parcel.groups, records, strict=True)
    ]
