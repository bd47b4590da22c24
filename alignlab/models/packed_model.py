"""The one forward pass: a transformers model, its heads, and the only function that turns tokens into log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignlab.core import AlignlabError, Group, ModelKind
from alignlab.core.memory import in_halves
from alignlab.models.adapters import adapter_in_use
from alignlab.models.attention import PLAN, path, plan_of, shortest_window, without_tf32, worthwhile
from alignlab.models.log_probs import Entropy, Scaling, chunks, log_probs
from alignlab.models.packing import Layout, Rows, lay_out, micro_batches
from alignlab.models.private_api import attention_of, is_weight
from alignlab.models.quantization import precision

CRITIC = "critic"
"""The name of a critic's own adapter, beside "default"."""


@dataclass(frozen=True)
class Features:
    """What makes the forward pass fast. Each can be turned off, and none changes a result beyond rounding.

    Attributes:
        segments: attention goes over the segments of a row without padding, instead of through a mask of all pairs.
        eager_grad: the gradient of log-probs with respect to hidden states is made in the forward pass, while the
            logits are there, instead of from logits computed anew.
        fused_lora: a LoRA layer multiplies by base and adapter at once.
    """

    segments: bool = True
    eager_grad: bool = True
    fused_lora: bool = True


@dataclass(frozen=True)
class InStep:
    """What processes need that must do equally many forward passes.

    Attributes:
        passes: from how many this process has to do, how many all do; a meeting of all.
        spare: what is read in passes that this process does only for the others.
    """

    passes: Callable[[int], int]
    spare: Group


class PackedModel(nn.Module):
    """A causal language model, sequence classifier or token classifier behind one forward pass over packed rows.

    Attributes:
        network: the transformers model, or the PEFT model around it.
        tokenizer: its tokenizer.
        kind: "policy", "score" or "step".
        layout: "varlen", "packed" where attention must go through a mask, or "plain" where the probe found that the
            model cannot be packed exactly.
        features: what makes it fast; on from `load_model` on.
        dropout: whether it keeps its own dropout in training.
        whole_logits: use the model's own forward for logits; set by the probe where its head is more than a linear
            map with the usual scalings. Slower, needs memory for [R, L, V].
        head_use: how the map to the vocabulary is used for each chunk of log-probs: as a module; by its weight alone,
            where the number of calls to modules must not depend on the data (ZeRO-3); or in one chunk, where there is
            more to it than a weight.
        notes: what the probe found, for the log.
        value_head, critic, critic_decoder: a policy's critic; see `heads.add_value_head`.
        language_head: a score model's; see `heads.add_language_head`.
        source: the folder or Hub id it was loaded from.
        fresh_adapter: whether its adapter is new and changes nothing yet: the reference is then the base.
        compute_dtype: what products are made in; None: in what the weights are held in.
        autocasts: whether the model sees to that by itself, through autocast, and no engine does.
        loaded_in: name of a trained weight that is held in more than it was loaded in → what that was.
        gathered: the whole of a weight that is divided among processes, called by all of them; None: each has all.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, kind: ModelKind = "policy") -> None:
        super().__init__()
        self.network: Any = network
        self.tokenizer = tokenizer
        self.kind: ModelKind = kind
        self.layout: Layout = "packed"
        self._features = Features()
        self.dropout = False
        self.whole_logits = False
        self.head_use: Literal["module", "weight", "once"] = "module"
        self.notes: list[str] = []
        self.value_head: nn.Linear | None = None
        self.critic: Literal["shared", "own"] = "shared"
        self.critic_decoder: Any = None
        self.language_head: nn.Module | None = None
        self.source = ""
        self.fresh_adapter = False
        self.compute_dtype: torch.dtype | None = None
        self.autocasts = True
        self.loaded_in: dict[str, torch.dtype] = {}
        self.gathered: Callable[[Tensor], Tensor] | None = None

    @property
    def features(self) -> Features:
        return self._features

    @features.setter
    def features(self, features: Features) -> None:
        self._features = features
        if hasattr(self.network, "peft_config"):
            from alignlab.models.lora import fuse  # with PEFT, which takes a second

            refused = fuse(self.network, features.fused_lora)
            if refused and refused not in self.notes:
                self.notes.append(refused)

    @property
    def base(self) -> Any:
        """The transformers model itself, without PEFT around it (adapters stay in place inside)."""
        return self.network.get_base_model() if hasattr(self.network, "peft_config") else self.network

    @property
    def config(self) -> Any:
        """The text model's config."""
        return self.base.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: that of its weights, or of its products."""
        return self.compute_dtype or precision(self.base)

    def precision(self, cache: bool = True) -> AbstractContextManager[Any]:
        """Around every use of its modules that is not `forward`: products in the precision of the run.

        Args:
            cache: keep rounded weights until the end, for many passes.
        """
        if self.compute_dtype is None or not self.autocasts:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype, cache_enabled=cache)

    @property
    def decoder(self) -> Any:
        """The part that yields hidden states."""
        base = self.base
        return base.get_decoder() if self.kind == "policy" else getattr(base, base.base_model_prefix)

    @property
    def head(self) -> Any:
        """The linear map on hidden states: to the vocabulary, a score, or step labels."""
        base = self.base
        if self.kind == "policy":
            return base.get_output_embeddings()
        return base.score if hasattr(base, "score") else base.classifier

    @property
    def small_heads(self) -> list[nn.Module]:
        """Heads with few outputs, which stay in float32: a score's or step's, and the critic's."""
        found = [None if self.kind == "policy" else self.head, self.value_head]
        return [head for head in found if head is not None]

    @property
    def pad_id(self) -> int:
        pad = self.config.pad_token_id
        return int(pad) if pad is not None else 0

    @property
    def max_length(self) -> int | None:
        """Positions the model knows, prompt and response together; None where there is no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    def lay_out(self, groups: Sequence[Group]) -> Rows:
        """The groups as rows in this model's layout, on this model's device."""
        skips = self.config.pad_token_id if self.kind == "score" else None
        return lay_out(groups, self._layout_for(groups), self.pad_id, skips).to(self.device)

    def micro_batches(self, groups: Sequence[Group], max_tokens_per_microbatch: int) -> list[list[int]]:
        return micro_batches(groups, max_tokens_per_microbatch, self._layout_for(groups))

    def _layout_for(self, groups: Sequence[Group]) -> Layout:
        """Varlen rows where the model takes them and pieces are large enough to be worth a call to the kernel each."""
        if self.layout != "varlen":
            return self.layout
        longest = max((len(g.prompt_ids) + len(r.token_ids) for g in groups for r in g.responses), default=0)
        limit = shortest_window(self.config)
        within = limit is None or longest <= limit
        by = path(self.device, segments=self.features.segments)
        return "varlen" if within and worthwhile(groups, by) else "packed"

    def forward(self, rows: Rows, reads: Iterable[str] = ("logp",), temperature: float = 1.0) -> dict[str, Tensor]:
        """The values of `core.Outputs` for the loss-bearing tokens (axis T) and responses (axis N) of `rows`.

        A plain dictionary, because distributed engines look for tensors in what a module returns.

        Args:
            rows: from `lay_out`.
            reads: which outputs to compute: "logp", "entropy" (with "entropy_grad", differentiable), "value", "score",
                "step".
            temperature: log-probs are of softmax(logits / temperature): what was sampled from, when sampling.
        """
        with self.precision(cache=False):  # else recomputing activations would save less
            return self._outputs(rows, set(reads), temperature)

    def _outputs(self, rows: Rows, reads: set[str], temperature: float) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        entropy: Entropy = "gradient" if "entropy_grad" in reads else "value" if "entropy" in reads else "no"
        speaks = bool(reads & {"logp", "entropy"})
        logp: tuple[Tensor, Tensor] | None = None
        if self.whole_logits and self.kind == "policy" and speaks:
            logits = self._run(self.network, rows).logits.flatten(0, 1)
            scaled = Scaling(temperature=temperature)(logits[rows.predict_T])
            logp = _from_logits(scaled, rows.target_T, entropy)
        places: dict[str, Tensor] = {}
        if (speaks and logp is None) or ("value" in reads and self.critic == "shared"):
            places["predict"] = rows.predict_T
        if "score" in reads:
            places["score"] = rows.last_N
        if "step" in reads:
            places["step"] = rows.place_T
        hidden = self._hidden(self.decoder, rows, places)
        if speaks:
            logp = logp or self._log_probs(hidden["predict"], rows.target_T, temperature, entropy)
            values["logp_T"] = logp[0]
            if entropy != "no":
                values["entropy_T"] = logp[1]
        if "value" in reads:
            values["value_T"] = self._values(hidden.get("predict"), rows)
        if "score" in reads:
            values["score_N"] = self._apply_head(self.head, hidden["score"]).squeeze(-1)
        if "step" in reads:
            values["step_TL"] = self._apply_head(self.head, hidden["step"])
        return values

    def _values(self, hidden: Tensor | None, rows: Rows) -> Tensor:
        """The critic's values where a token is about to be chosen, shape (T,).

        Args:
            hidden: the policy's hidden states there, for a critic on the same trunk.
        """
        if self.value_head is None:
            raise AlignlabError("this model has no value head: see `add_value_head`")
        places = {"predict": rows.predict_T}
        if self.critic_decoder is not None:
            hidden = self._hidden(self.critic_decoder, rows, places)["predict"]
        elif self.critic == "own":
            with adapter_in_use(self.network, CRITIC):
                hidden = self._hidden(self.decoder, rows, places)["predict"]
        assert hidden is not None
        return self._apply_head(self.value_head, hidden).squeeze(-1)

    def _hidden(self, decoder: Any, rows: Rows, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hidden states (·, D) at flat indices of `rows`, by name, from a single pass; none where none is asked for."""
        if not places:
            return {}
        hidden = self._run(decoder, rows).last_hidden_state.flatten(0, 1)
        found = hidden[torch.cat(list(places.values()))].split([len(p) for p in places.values()])
        return dict(zip(places, found, strict=True))

    def _run(self, module: Any, rows: Rows) -> Any:
        """Call a transformers module on rows: with a mask of our own when packed, plainly otherwise."""
        if rows.layout == "plain":  # padding comes last, where a causal model does not look: no mask is needed
            return module(input_ids=rows.input_ids_RL, use_cache=False)
        plan = {PLAN: plan_of(rows)} if rows.layout == "varlen" else {}
        return module(
            input_ids=rows.input_ids_RL,
            position_ids=rows.position_RL,
            attention_mask=self._masks(rows),
            use_cache=False,
            **plan,
        )

    def _masks(self, rows: Rows) -> Tensor | dict[str, Tensor]:
        """The attention mask, or one for each kind of layer where the model has several."""
        window = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"layers of another kind than attention to a prefix or a window: {', '.join(sorted(kinds))}"
            )

        def build(limit: int | None) -> Tensor:
            if rows.layout == "varlen":  # has four axes, so that transformers makes none of its own
                return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=rows.input_ids_RL.device)
            allowed = rows.attention(limit)
            if attention_of(self.base) == "eager":  # adds the mask to the scores
                dtype = self.base.dtype
                return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
            return allowed

        if not kinds:
            return build(window)
        return {kind: build(window if kind == "sliding_attention" else None) for kind in kinds}

    @staticmethod
    def _apply_head(head: Any, hidden: Tensor) -> Tensor:
        """Autocast would round what a head says to 8 bits, TF32 to 11: a score, a value."""
        with torch.autocast(hidden.device.type, enabled=False), without_tf32():
            return head(hidden.to(next(head.parameters()).dtype)).float()

    @property
    def vocabulary_head(self) -> Any:
        """The map to the vocabulary: a policy's own head, or the language head beside a score; None without one."""
        return self.head if self.kind == "policy" else self.language_head

    @property
    def _vocabulary_head(self) -> Any:
        if self.vocabulary_head is None:
            raise AlignlabError(f"a {self.kind} model has log-probs only beside a language head")
        return self.vocabulary_head

    def _log_probs(self, hidden: Tensor, target: Tensor, temperature: float, entropy: Entropy) -> tuple[Tensor, Tensor]:
        """Log-probs of `target` (T,) from hidden states (T, D), in chunks: memory does not grow with T times the
        vocabulary. Where the head is more than a weight, chunks are computed again in the backward pass."""
        head, scaling = self._vocabulary_head, self._scaling(temperature)
        if self._plain_head(head):
            return log_probs(hidden, target, head, scaling, entropy)
        vocabulary = int(self.config.vocab_size)  # not the head's own size: its weight may be elsewhere right now
        parts = chunks(target, vocabulary if self.head_use != "once" else 1)
        pieces: list[Sequence[Tensor]] = []
        for part in parts:
            chunk = (hidden[part], target[part], scaling, entropy)
            if torch.is_grad_enabled() and len(parts) > 1:
                pieces.append(checkpoint(self._chunk, *chunk, use_reentrant=False))
            else:
                pieces.append(self._chunk(*chunk))
        if not pieces:  # keep the graph, so that every process has a backward pass
            empty = hidden.sum(-1).float()
            return empty, empty.detach()
        return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])

    def _plain_head(self, head: Any) -> bool:
        """Whether the map to the vocabulary is a weight, which may be used without calling the module."""
        return self.features.eager_grad and self.head_use == "module" and is_weight(head)

    def _chunk(self, hidden: Tensor, target: Tensor, scaling: Scaling, entropy: Entropy) -> tuple[Tensor, Tensor]:
        head = self._vocabulary_head
        logits = head(hidden) if self.head_use != "weight" else nn.functional.linear(hidden, head.weight, head.bias)
        return _from_logits(scaling(logits), target, entropy)

    def _scaling(self, temperature: float) -> Scaling:
        """What architectures do to logits after the linear map: Cohere and Granite scale, Gemma caps softly."""
        scale = getattr(self.config, "logit_scale", None) or 1.0
        scale /= getattr(self.config, "logits_scaling", None) or 1.0
        return Scaling(scale, getattr(self.config, "final_logit_softcapping", None) or None, temperature)

    @torch.no_grad()
    def outputs(
        self,
        groups: Sequence[Group],
        reads: Iterable[str] = ("logp",),
        max_tokens_per_microbatch: int = 16384,
        temperature: float = 1.0,
        in_step: InStep | None = None,
    ) -> dict[str, list[Tensor]]:
        """Outputs of a scoring pass, one CPU tensor for each response in the order of the groups: (C',) for
        per-token outputs, () for scores. Runs without gradient and without dropout.

        Args:
            in_step: where weights are divided among processes, so that all must do equally many passes.
        """
        reads = tuple(reads)
        counts = [len(g.responses) for g in groups]
        offset = [sum(counts[:i]) for i in range(len(counts))]
        found: dict[str, list[Tensor]] = {}
        with evaluating(self):
            plan = self.micro_batches(groups, max_tokens_per_microbatch)

            def read(batch: list[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
                yield batch, self(self.lay_out([groups[i] for i in batch]), reads, temperature)

            spares = in_step.passes(len(plan)) - len(plan) if in_step else 0
            results = (next(read(batch)) for batch in plan) if in_step else in_halves(plan, read, "a scoring pass")
            for batch, out in results:
                chosen = [groups[i] for i in batch]
                lengths = [r.loss_tokens for g in chosen for r in g.responses]
                slots = [offset[i] + k for i in batch for k in range(counts[i])]
                for key, value in out.items():
                    name, axes = key.rsplit("_", 1)
                    parts = value.cpu().split(lengths) if axes.startswith("T") else value.cpu().unbind()
                    column = found.setdefault(name, [torch.empty(0)] * sum(counts))
                    for slot, part in zip(slots, parts, strict=True):
                        column[slot] = part
            for _ in range(spares):
                self(self.lay_out([in_step.spare]), reads, temperature)  # type: ignore[union-attr]
        return found


def _from_logits(logits: Tensor, target: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor]:
    """(log-prob of target, entropy or zeros) from scaled logits (T, V)."""
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, target[:, None]).squeeze(-1)
    if entropy == "no":
        return logp, torch.zeros_like(logp).detach()
    with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
        return logp, -(log_p.exp() * log_p).sum(-1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside, as before outside."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
