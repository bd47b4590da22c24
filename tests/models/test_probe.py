"""The probe lets packing through where it is exact, and nothing else through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alignlab.core import Group
from alignlab.core.memory import is_memory_error
from alignlab.models import PackedModel
from alignlab.models.attention import FlexPlan, Segments
from alignlab.models.log_probs import Scaling
from alignlab.models.packing import Rows, Span
from alignlab.models.probe import probe, tolerance
from tests import tiny

BY_DEFAULT = 0.02
"""Standard deviation of transformers' own random weights: attention matters little with it."""


def causal(rows: Rows, window: int | None = None) -> Tensor:
    """The wrong mask: every token sees all before it in its row."""
    count, length = rows.input_ids_RL.shape
    return torch.ones(length, length, dtype=torch.bool).tril().expand(count, 1, length, length)


RIGHT = Rows.attention

BEST = {"gemma2": "packed", "mistral": "packed", "gemma3": "packed"}
"""Gemma 2 caps its scores, and transformers has no SDPA for it; the windows of the tiny ones of the others are shorter
than the trial's sequences."""


def notes(name: str, model: PackedModel) -> list[str]:
    """What is said of a model that is packed."""
    mask = f"attention of {type(model.base).__name__} goes through a mask of all pairs"
    return [f"{mask}: it sees windows of {tiny.WINDOW} tokens"] if name in ("mistral", "gemma3") else []


WRONG = {
    "causal": causal,
    "siblings": lambda rows, window=None: RIGHT(replace(rows, branch_RL=torch.zeros_like(rows.branch_RL)), window),
    "groups": lambda rows, window=None: RIGHT(replace(rows, group_RL=torch.zeros_like(rows.group_RL)), window),
}


@pytest.mark.parametrize("std", [0.3, BY_DEFAULT])
@pytest.mark.parametrize("name", tiny.PACKABLE)
def test_exact_where_it_is(name: str, std: float) -> None:
    model = tiny.model(name, std=std)
    probe(model)
    assert (model.layout, model.whole_logits, model.notes) == (BEST.get(name, "varlen"), False, notes(name, model))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("std", [0.3, BY_DEFAULT])
@pytest.mark.parametrize("name", tiny.PACKABLE)
def test_a_wrong_mask_is_caught(name: str, std: float, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(name, std=std)
    monkeypatch.setattr(Rows, "attention", WRONG[wrong])
    probe(model)
    assert model.layout == "plain"
    assert "plain sequences are used" in model.notes[0]


@pytest.mark.parametrize("kind", ["score", "step"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_heads_are_probed_too(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(name, kind, std=BY_DEFAULT)
    probe(model)
    assert (model.layout, model.notes) == (BEST.get(name, "varlen"), notes(name, model))
    monkeypatch.setattr(Rows, "attention", causal)
    probe(model)
    assert model.layout == "plain"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_wrong_positions_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(name)
    right = model.lay_out

    def restarts_nowhere(groups: list[Group]) -> Rows:
        rows = right(groups)
        return replace(rows, position_RL=torch.arange(rows.position_RL.shape[1]).expand_as(rows.position_RL))

    monkeypatch.setattr(model, "lay_out", restarts_nowhere)
    probe(model)
    assert model.layout == "plain"


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_windows_longer_than_the_trial_are_tried_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(name, sliding_window=4096)
    probe(model)
    assert model.layout == ("packed" if name == "gemma2" else "varlen")
    assert model.config.sliding_window == 4096
    monkeypatch.setattr(Rows, "attention", lambda rows, window=None: RIGHT(rows, None))
    probe(model)
    assert model.layout == "plain", "a mask that knows no window"


@pytest.mark.parametrize("name", ["bloom", "mamba", "openai_gpt"])
def test_what_cannot_be_packed_is_run_plainly(name: str) -> None:
    model, groups = tiny.model(name), tiny.some_groups()
    probe(model)
    assert model.layout == "plain"
    assert not model.whole_logits
    assert len(model.notes) == 1
    assert type(model.network).__name__ in model.notes[0]
    assert "plain sequences are used" in model.notes[0]
    with torch.no_grad():
        expected = tiny.plain_log_probs(model.network, groups)
    torch.testing.assert_close(torch.cat(model.outputs(groups)["logp"]), expected, atol=1e-5, rtol=0)


def test_layers_that_see_chunks_are_not_packed() -> None:
    """Llama 4 attends within chunks of 8,192 tokens, which no trial of some forty tokens reaches."""
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Llama4TextConfig(vocab_size=tiny.SIZE, intermediate_size=48, num_local_experts=2, head_dim=8, **sizes)
    assert "chunked_attention" in config.layer_types
    model = PackedModel(AutoModelForCausalLM.from_config(config).eval(), tiny.tokenizer()).eval()
    probe(model)
    assert model.layout == "plain"


def test_a_head_that_is_more_than_linear_gets_the_model_s_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = tiny.model("granite"), tiny.some_groups()
    monkeypatch.setattr(PackedModel, "_scaling", lambda _, temperature: Scaling())  # a scaling we do not know of
    with torch.no_grad():
        expected = tiny.plain_log_probs(model.network, groups)
        assert float((model(model.lay_out(groups))["logp_T"] - expected).abs().max()) > 0.1
    probe(model)
    assert (model.whole_logits, model.layout) == (True, "varlen")
    assert "own forward computes the logits" in model.notes[0]
    torch.testing.assert_close(torch.cat(model.outputs(groups)["logp"]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [0.3, BY_DEFAULT])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_in_other_precisions(name: str, std: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(name, std=std).to(dtype)
    probe(model)
    assert (model.layout, model.whole_logits, model.notes) == (BEST.get(name, "varlen"), False, notes(name, model))
    monkeypatch.setattr(Rows, "attention", causal)
    probe(model)
    assert model.layout == "plain"


@pytest.mark.parametrize("positions", [8, 16])
def test_within_few_positions(positions: int) -> None:
    model = tiny.model("gpt2", n_positions=positions)
    assert model.max_length == positions
    probe(model)
    assert model.layout == "varlen"


WRONG_PIECES = {
    "no trunk": lambda pieces: [(t, []) for t, _ in pieces],
    "own tokens alone": lambda pieces: [p for t, branches in pieces for p in [(t, []), *((b, []) for b in branches)]],
    "siblings": lambda pieces: [(t, [slice(b[0].start, b[-1].stop)] if b else []) for t, b in pieces],
    "groups": lambda pieces: [(slice(0, max((b or [t])[-1].stop for t, b in pieces)), [])],
}


@pytest.mark.parametrize("wrong", WRONG_PIECES)
@pytest.mark.parametrize("std", [0.3, BY_DEFAULT])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_wrong_pieces_are_caught(name: str, std: float, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = tiny.model(name, std=std), Segments.__init__

    def init(self: Segments, spans: tuple[Span, ...]) -> None:
        right(self, spans)
        self.pieces = WRONG_PIECES[wrong](self.pieces)

    monkeypatch.setattr(Segments, "__init__", init)
    probe(model)
    assert model.layout == "packed"
    (note,) = model.notes
    assert "goes through a mask of all pairs: mean difference without it" in note


@pytest.mark.parametrize("what", ["dropout", "eager"])
def test_what_pieces_cannot_do_goes_through_a_mask(what: str) -> None:
    model = tiny.model("llama", attention="eager" if what == "eager" else "sdpa")
    model.dropout = what == "dropout"
    probe(model)
    assert model.layout == "packed"
    said = ["it keeps its dropout (model.dropout=true)"] if model.dropout else []
    assert [note.split(": ")[1] for note in model.notes] == said


# ---------------------------------------------------------------------- as on GPUs


def test_on_gpus_rows_without_padding_go_through_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same log-probs; a wrong mask is found, and said."""
    with tiny.flex_on_cpu():
        model, groups = tiny.model("qwen2"), tiny.some_groups()
        probe(model)
        assert (model.layout, model.notes) == ("varlen", [])
        with torch.no_grad():
            expected = tiny.plain_log_probs(model.network, groups)
        torch.testing.assert_close(torch.cat(model.outputs(groups)["logp"]), expected, atol=1e-5, rtol=0)
        right = FlexPlan.__init__
        monkeypatch.setattr(FlexPlan, "__init__", lambda plan, group, branch: right(plan, group, 0 * branch))
        probe(model)
        assert model.layout == "packed"
        (note,) = model.notes
        assert "goes through a mask of all pairs: mean difference without it" in note


def cannot_compile(graph: object, inputs: object) -> object:
    raise ValueError("no kernel\nof this size")


def no_memory(graph: object, inputs: object) -> object:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_why_flex_attention_is_not_used_is_said() -> None:
    with tiny.flex_on_cpu(cannot_compile):
        model = tiny.model("llama")
        probe(model)
    assert model.layout == "packed"
    (note,) = model.notes
    assert note.startswith("attention of LlamaForCausalLM goes through a mask of all pairs: FlexAttention fails for 4")
    assert "(no kernel): " in note


def test_a_lack_of_memory_is_no_refusal() -> None:
    with tiny.flex_on_cpu(no_memory), pytest.raises(Exception, match="out of memory") as caught:
        probe(tiny.model("llama"))
    assert is_memory_error(caught.value)


def test_tf32_is_put_down_to_rounding_on_gpus() -> None:
    """It has 10 binary digits after the first, as float16 has; products of CPUs have 23."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        assert tolerance(torch.float32, gpu) == tolerance(torch.float16, gpu)
        assert tolerance(torch.float32, cpu) < tolerance(torch.float32, gpu)
        torch.set_float32_matmul_precision("highest")
        assert tolerance(torch.float32, gpu) == tolerance(torch.float32, cpu)
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_is_changed_by_it() -> None:
    model = tiny.model("gpt2").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    probe(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_a_trained_model_is_packed(stories: object) -> None:
    from transformers import AutoModelForCausalLM

    for dtype in (torch.float32, torch.bfloat16):
        network = AutoModelForCausalLM.from_pretrained(stories, dtype=dtype)
        model = PackedModel(network, tiny.tokenizer()).eval()
        probe(model)
        assert (model.layout, model.notes) == ("varlen", [])
