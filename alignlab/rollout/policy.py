"""A policy as one holds it in a notebook: a model, and what one asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from alignlab.build import section
from alignlab.core import Algorithm, ConfigError, Group, RolloutContext
from alignlab.models import PackedModel, save_model
from alignlab.rollout.local import LocalRollout


class Policy:
    """A model that can be sampled from, asked for log-probs, trained (`Trainer`) and saved.

    Attributes:
        model: the model behind the one forward pass.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PackedModel) -> None:
        self.model = model
        self.tokenizer = model.tokenizer

    def sample(
        self, prompts: Sequence[Group], n: int = 1, *, seed: int = 0, progress: bool = True, **settings: Any
    ) -> list[Group]:
        """n responses to each prompt.

        Args:
            prompts: from `alignlab.prompts`, or groups whose prompts are wanted.
            n: responses per prompt, >= 1.
            seed: of the random numbers. The same seed, prompts and weights give the same responses.
            progress: show a bar, on a terminal, for what takes over two seconds.
            settings: those of the config group `rollout`: `max_new_tokens` (128), `temperature` (1.0; 0 is greedy),
                `top_k`, `top_p`, `min_p`, `stop`, …

        Returns:
            Groups with the prompts' tokens and n responses, in order. Each response has its text, tokens, whether it
            `finished`, and the column `behaviour_logp`: a log-prob for each token, in nats.

        Raises:
            ConfigError: there is no such setting, or its value is impossible.
            DataError: a prompt leaves no room for a response.
        """
        engine = section(LocalRollout, settings, "sample")
        with engine.start(RolloutContext(None, Path(), show_progress=progress)):
            return engine.sampler(self.model).sample(prompts, n, seed)

    def log_probs(
        self, groups: Sequence[Group], temperature: float = 1.0, max_tokens_per_microbatch: int = 16384
    ) -> list[list[Tensor]]:
        """Log-probs of the responses' loss-bearing tokens, in nats, without gradient.

        Args:
            temperature: of softmax(logits / temperature), > 0.
            max_tokens_per_microbatch: tokens in a forward pass.

        Returns:
            For each group, for each response, a float32 tensor of shape (C,) on the CPU: C is the number of its
            loss-bearing tokens.
        """
        found = self.model.outputs(groups, ("logp",), max_tokens_per_microbatch, temperature).get("logp", [])
        values = iter(found)
        return [[next(values) for _ in group.responses] for group in groups]

    def save(self, folder: str | Path, merge: bool = False) -> list[str]:
        """Write the model to a folder from which plain transformers and peft load it.

        Args:
            merge: fold an adapter into its base.

        Returns:
            What there is to say of it.
        """
        return save_model(self.model, Path(folder), merge=merge)

    def __repr__(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return f"Policy({self.model.source!r}, {trained:,} trained parameters, {self.model.layout} rows)"


def model_for(policy: Any, algorithm: Algorithm) -> PackedModel:
    """The model inside a policy, which must be of the kind that the algorithm trains."""
    model = policy if isinstance(policy, PackedModel) else getattr(policy, "model", None)
    if not isinstance(model, PackedModel):
        raise ConfigError(f"policy: a model from alignlab.load is wanted, this is {type(policy).__name__}")
    if model.kind != algorithm.model:
        name = type(algorithm).__name__
        raise ConfigError(
            f"policy: {name} trains a {algorithm.model} model, this is a {model.kind} model: "
            f"load it with alignlab.load(…, kind={algorithm.model!r})"
        )
    return model
