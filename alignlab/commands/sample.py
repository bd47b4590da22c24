"""sample responses, score or label them, write a data set:  alignlab sample model=PATH data.path=FILE"""

from __future__ import annotations

from collections.abc import Sequence

from alignlab.commands import COMPOSING, out_folder, parse


def run(arguments: Sequence[str]) -> int:
    """Write groups of sampled responses to `out`/groups.jsonl."""
    config = parse(arguments, *COMPOSING).config("sample")
    if config is None:
        return 0
    from alignlab.rollout.produce import produce

    out = out_folder(config)
    result = produce(config, out)
    made = f"{result['groups']} groups, {result['generated_tokens']:,} tokens, {result['seconds']:.1f} s"
    already = "already done: " if result.get("already_done") else ""
    print(f"{already}{made} → {out}/groups.jsonl")
    return 0
