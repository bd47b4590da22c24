"""What a user might have written in `mine.py`: a class `Mine` of each kind that works, but for what a case puts in.

In a case, `scorer(score="return 1 / 0")` is the text of a module; names of attributes are given in the same way, as in
`scorer(fills="'reward'")`, and a line beside the class as `first="import nothing"`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

GROUPS = ("scoring", "environment", "rollout", "order", "schedule", "tracker", "adapter", "benchmark")

Methods = dict[str, tuple[str, str]]
"""Its name → its parameters and what it does."""


def own_configs(here: Path, prepared: Path) -> None:
    """An option `mine` in each config group that a class may be named in."""
    for group in GROUPS:
        (here / "conf" / group).mkdir(parents=True)
        (here / "conf" / group / "mine.yaml").write_text("_target_: mine.Mine\n")


def _kind(imports: str, base: str, attributes: dict[str, str], methods: Methods) -> Callable[..., str]:
    methods = {"__init__": ("self, **given", "pass"), **methods}

    def write(first: str = "", **other: str) -> str:
        lines = ["from alignlab.core import Group, Response", imports, first, f"class Mine{base}:"]
        for name, value in attributes.items():
            if name not in methods:
                lines.append(f"    {name} = {other.get(name, value)}")
        for name in {**methods, **{n: ("self", "") for n in other if n not in attributes}}:
            parameters, body = methods.get(name, ("self", ""))
            if name == "__init__" and base and name not in other:
                continue
            if name in PROPERTIES:
                lines.append("    @property")
            lines.append(f"    def {name}({parameters}):")
            lines.append(textwrap.indent(other.get(name, body), " " * 8))
        return "\n".join(lines) + "\n"

    return write


PROPERTIES = ("report", "temperature", "generated_tokens")
REWARDS = "for r in (r for g in groups for r in g.responses): r.columns['reward'] = 0.5 + len(r.text)"
DRAW = "return [g.with_responses([Response([5, 6], columns={'behaviour_logp': [-1.0, -1.0]}) for _ in range(n)])"

algorithm = _kind("from alignlab import SFT", "(SFT)", {}, {
    "loss": ("self, outputs, batch", "return super().loss(outputs, batch)"),
    **{name: ("self, groups", f"return super().{name}(groups)") for name in ("prepare", "arrange")},
    **{name: ("self, metrics", f"return super().{name}(metrics)") for name in ("derive", "enough")},
    "check": ("self, group", "return super().check(group)"),
    "setup": ("self, tokenizer", "pass"),
})  # fmt: skip
sampling_algorithm = _kind("from alignlab import GRPO", "(GRPO)", {}, {
    name: ("self, groups", f"return super().{name}(groups)") for name in ("prepare", "arrange")
})  # fmt: skip
scorer = _kind("", "", {"fills": "('reward',)"}, {"score": ("self, groups", REWARDS)})
binding_scorer = _kind("", "", {"fills": "('reward',)"}, {
    "score": ("self, groups", REWARDS), "bind": ("self, policy, tokenizer", "pass"),
    "bind_sampler": ("self, sampler", "pass"), "report": ("self", "return {}"),
})  # fmt: skip
environment = _kind("", "", {"fills": "()"}, {
    "rollout": ("self, sampler, groups, n, seed", "return sampler.sample(groups, n, seed)"),
})  # fmt: skip
conversation = _kind("from alignlab.rollout import MultiTurn", "(MultiTurn)", {"fills": "('reward',)"}, {
    "start": ("self, group", "return 0"), "reply": ("self, state, text", "return None, 1.0"),
    "columns": ("self, state", "return {}"),
})  # fmt: skip
sampler = _kind("from alignlab.rollout import BaseRollout", "", {}, {
    "sample": ("self, groups, n, seed", f"{DRAW} for g in groups]"), "generated_tokens": ("self", "return 4"),
})  # fmt: skip
engine = _kind("from contextlib import nullcontext", "", {
    "importance_cap": "None", "off_policy": "False", "prefetches": "False",
}, {
    "temperature": ("self", "return 1.0"), "check": ("self, config, algorithm", "pass"),
    "start": ("self, context", "return nullcontext()"), "sampler": ("self, policy", "return None"),
})  # fmt: skip
callback = _kind("from alignlab import Callback", "(Callback)", {}, {
    "on_start": ("self, trainer", "pass"), "on_step": ("self, trainer", "pass"),
    "on_iteration": ("self, trainer, sampled", "pass"), "on_end": ("self, trainer, error", "pass"),
    "on_checkpoint": ("self, trainer, folder", "pass"), "on_resume": ("self, trainer, folder", "pass"),
    "on_evaluate": ("self, trainer, metrics", "pass"),
})  # fmt: skip
schedule = _kind("", "", {}, {"__call__": ("self, done", "return 1.0")})
order = _kind("", "", {"batches_per_epoch": "3", "state": "{}"}, {
    "batch": ("self, index", "return [0, 1, 2, 3]"), "observe": ("self, index, records, groups", "pass"),
})  # fmt: skip
tracker = _kind("", "", {}, {
    "start": ("self, folder, config, lines", "return None"), "log": ("self, step, metrics", "pass"),
    "summarize": ("self, metrics", "pass"), "finish": ("self, failed", "pass"),
})  # fmt: skip
adapter_kind = _kind("", "", {"trains_base": "True"}, {"apply": ("self, network, kind", "return network")})
benchmark = _kind("", "", {"name": "'mine'", "files": "()"}, {
    "evaluate": ("self, subject", "return {'reward': 1.0}"), "write_data": ("self, folder, model", "pass"),
    "base_path": ("self", "return None"), "base_model": ("self", "return None"),
})  # fmt: skip


def sampling_engine(**methods: str) -> str:
    """A module with an engine whose sampler is as the case says."""
    theirs = sampler(**methods).replace("class Mine", "class Sampler")
    return theirs + engine(sampler="return Sampler()")


def function(body: str) -> str:
    """A module with a reward function."""
    return "def rule(prompt, response, extra):\n" + textwrap.indent(body, "    ") + "\n"


def parser(body: str) -> str:
    """A module with a parser."""
    return "from alignlab.core import Example\ndef parse(record):\n" + textwrap.indent(body, "    ") + "\n"
