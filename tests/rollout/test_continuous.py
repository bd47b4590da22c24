"""Rows that come and go: what is kept of them, what it is worth, and that it changes no result."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.core import AlignlabError
from alignlab.models import PackedModel
from alignlab.models.attention import FlexPlan
from alignlab.rollout import LocalRollout, cohort, continuous, local, quick
from alignlab.rollout.batching import Queue, Row, Space
from alignlab.rollout.cohort import Cohort
from alignlab.rollout.continuous import ContinuousDecoding, takes_plans
from tests import tiny
from tests.rollout.tiny import EOS, model, plain_logp, prompts

LENGTHS = (2, 13, 7, 13, 30)


@pytest.fixture(scope="module")
def llama() -> PackedModel:
    packed = model("llama")
    assert takes_plans(packed, 64)
    return packed


def drawn(packed: PackedModel, lengths: Sequence[int] = LENGTHS, n: int = 3, **settings: Any) -> list[list[Any]]:
    given = LocalRollout(**{"max_new_tokens": 12, **settings})
    sampled = given.sampler(packed).sample(prompts(*lengths), n, 0)
    return [[(r.token_ids, r.columns["behaviour_logp"]) for r in g.responses] for g in sampled]


def check_same(found: list[list[Any]], expected: list[list[Any]]) -> None:
    assert [[ids for ids, _ in g] for g in found] == [[ids for ids, _ in g] for g in expected]
    for group, other in zip(found, expected, strict=True):
        for (_, logp), (_, same) in zip(group, other, strict=True):
            assert logp == pytest.approx(same, abs=1e-5)


# ---------------------------------------------------------------------- attention


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Of one token, by definition, in float64: (H, d) over (H', L, d)."""
    repeats = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(repeats, 0) for x in (keys, values))
    weight = (torch.einsum("hd,hld->hl", query.double(), keys) * scale).softmax(-1)
    return torch.einsum("hl,hld->hd", weight, values)


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("by_scores", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (9, 9, 4, 1), (6,)])
@pytest.mark.parametrize("shared", [1, 3])
def test_rows_attend_to_their_prompt_and_to_themselves(
    few_shapes: bool, by_scores: bool, lengths: tuple[int, ...], shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through steps in which rows and whole prompts leave, against each row's own list of keys and values."""
    if by_scores:  # what other devices than CPUs do
        monkeypatch.setattr(cohort, "_attend", cohort.attend_by_scores)
    generator, rng = torch.Generator().manual_seed(0), random.Random(sum(lengths))
    heads, size, scale = 2, 8, 0.3

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    counts = [rng.randint(1, 4) for _ in lengths]
    rows = Cohort(lengths, counts, 20, torch.device("cpu"), few_shapes)
    layer, total = SimpleNamespace(layer_idx=0), sum(lengths)
    query, key, value = rand(1, heads * shared, total, size), rand(1, heads, total, size), rand(1, heads, total, size)
    out = rows.attend(layer, query, key, value, scale)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for start, length in zip(starts, lengths, strict=True):
        for i in range(start, start + length):
            expected = attention(query[0, :, i], key[0, :, start : i + 1], value[0, :, start : i + 1], scale)
            torch.testing.assert_close(out[0, i].double(), expected, atol=1e-5, rtol=1e-5)

    seen = [(key[0, :, s : s + n], value[0, :, s : s + n]) for s, n in zip(starts, lengths, strict=True)]
    seen = [pair for pair, count in zip(seen, counts, strict=True) for _ in range(count)]
    while rows.rows:
        for _ in range(2):
            count = len(rows.rows)
            q, k, v = rand(count, heads * shared, size), rand(count, heads, size), rand(count, heads, size)
            seen = [
                (torch.cat([a, k[i][:, None]], 1), torch.cat([b, v[i][:, None]], 1)) for i, (a, b) in enumerate(seen)
            ]
            if few_shapes:
                places = rows.space.rows - count
                given = [
                    torch.cat([x, x.new_full((places, *x.shape[1:]), 9.0)]).transpose(0, 1)[None] for x in (q, k, v)
                ]
                found = rows.masked_step().attend(layer, given[0], given[1], given[2], scale)[0, :count]
            else:
                found = rows.step(0, q, k, v, scale)
            rows.length += 1
            expected = torch.stack([attention(q[i], *seen[i], scale) for i in range(count)])
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        going = sorted(rng.sample(range(count), rng.randint(0, count - 1)))
        order = rows.retain(going)
        assert sorted(order) == going
        seen = [seen[i] for i in order]
        assert not going or rows.space.rows < 2 * max(1, len(going)) * (2 if few_shapes else 1) + 1
        assert rows.contexts == [s[0].shape[1] - rows.length for s in seen]


def test_half_precision_by_scores_is_summed_in_float32() -> None:
    """Weights of 400 equal keys, 1/400 each, would not sum to 1 in bfloat16."""
    query, key = torch.zeros(1, 1, 1, 4).bfloat16(), torch.ones(1, 1, 400, 4).bfloat16()
    out, total = cohort.attend_by_scores(query, key, key, None)
    assert out.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert total.item() == pytest.approx(5.9914645, abs=1e-6)  # ln 400
    assert out.float().flatten().tolist() == pytest.approx([1.0] * 4, abs=5e-3)


def test_space_of_rows_that_left_is_given_back() -> None:
    rows = Cohort([10, 10], [4, 4], 30, torch.device("cpu"))
    key = torch.randn(1, 2, 20, 8)
    rows.attend(SimpleNamespace(layer_idx=0), key, key, key, None)
    assert rows.space.tokens == 2 * 10 + 8 * 30
    assert rows.retain([0, 2, 4, 5, 7]) == [0, 5, 2, 7, 4], "the last take the places of those that left"
    assert rows.space.tokens == 2 * 10 + 8 * 30, "more than half is in use"
    assert rows.retain([0, 2]) == [0, 2], "both of the first prompt"
    assert rows.space.tokens == 10 + 2 * 30
    assert rows._layers[0].own_key.shape == (2, 2, 30, 8) and rows._layers[0].trunk_key.shape == (1, 2, 10, 8)


# ---------------------------------------------------------------------- who is admitted


def row(length: int, limit: int, begun: int = 0) -> Row:
    return Row(list(range(length)), "", b"", 0, limit, tokens=[1] * begun)


def taken(queue: Queue, tokens: int, rows: int) -> list[tuple[int, int]]:
    return [(len(unit.context), len(unit.rows)) for unit in queue.take(tokens, rows)]


def test_the_queue_keeps_to_its_budget() -> None:
    queue = Queue([row(2, 4)] * 3 + [row(46, 4)] * 3 + [row(21, 4)] * 3, 100, 99)
    assert taken(queue, 0, 0) == [(46, 3)], "46 + 3·4 = 58; with the next, padded, 2·46 + 6·4 = 116"
    assert taken(queue, 58, 3) == [(21, 3)], "21 + 3·4 = 33 of 42; with the next 2·21 + 6·4 = 66"
    assert taken(queue, 91, 6) == [], "2 + 3·4 = 14 of 9"
    assert taken(queue, 86, 5) == [(2, 3)] and not queue, "exactly; as all that waits is there, little room is enough"


def test_the_queue_waits_for_a_quarter_of_the_budget() -> None:
    queue = Queue([row(4 + i, 2) for i in range(20)], 400, 99)
    queue.take(280, 1)
    assert taken(queue, 301, 5) == [], "99 are free"
    assert len(taken(queue, 300, 5)) > 1
    queue = Queue([row(4 + i, 2) for i in range(20)], 400, 8)
    assert len(taken(queue, 0, 0)) == 8
    assert taken(queue, 100, 7) == [] and len(taken(queue, 100, 6)) == 2


def test_rows_of_a_prompt_are_parted_only_where_they_must() -> None:
    queue = Queue([row(10, 20)] * 7, 100, 99)
    assert [taken(queue, 0, 0), taken(queue, 0, 0)] == [[(10, 4)], [(10, 3)]], "10 + 4·20 = 90"
    queue = Queue([row(10, 20)] * 3, 5, 99)
    assert [taken(queue, 0, 0) for _ in range(4)] == [[(10, 1)], [(10, 1)], [(10, 1)], []], "one always is"


def test_tokens_drawn_before_are_context() -> None:
    queue = Queue([row(10, 20, begun=15)] * 2, 99, 99)
    (unit,) = queue.take(0, 0)
    assert (len(unit.context), unit.room) == (25, 5)


def test_few_shapes() -> None:
    assert Space(3, 65, 9, 64).rounded() == Space(4, 128, 16, 64)
    assert Space(1, 1, 1, 1).rounded() == Space(1, 64, 1, 64)
    assert taken(Queue([row(60, 60)] * 9, 64 + 8 * 64, 99, few_shapes=True), 0, 0) == [(60, 8)]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens held) of each step."""
    seen = []
    append = ContinuousDecoding.append

    def watched(self: ContinuousDecoding, token_R: Tensor) -> None:
        seen.append((len(token_R), sum(each.space.tokens for each in self._cohorts)))
        append(self, token_R)

    monkeypatch.setattr(ContinuousDecoding, "append", watched)
    return seen


@pytest.mark.parametrize("budget", [60, 150, 400])
def test_batches_change_nothing_and_keep_to_the_budget(
    llama: PackedModel, held: list[tuple[int, int]], budget: int
) -> None:
    lengths = (2, 13, 7, 13, 30, 4, 4, 8, 21, 5)
    expected = drawn(llama, lengths)
    held.clear()
    check_same(drawn(llama, lengths, max_batch_tokens=budget), expected)
    assert max(tokens for _, tokens in held) <= budget


def test_prompts_are_read_once_and_ended_rows_leave(llama: PackedModel) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = llama.base.get_input_embeddings().register_forward_hook(lambda _, i, __: shapes.append(tuple(i[0].shape)))
    lengths = [len(ids) for group in drawn(llama, n=8) for ids, _ in group]
    hook.remove()
    assert len(set(lengths)) > 3, "rows must end at different times"
    assert shapes[0] == (1, sum(LENGTHS)), "every prompt once, without padding"
    assert shapes[1:] == [(1, sum(length > step for length in lengths)) for step in range(1, max(lengths))]


def test_the_next_begin_while_the_last_go_on(llama: PackedModel, held: list[tuple[int, int]]) -> None:
    """Four prompts at a time fit; without rows that join, the steps would be those of the longest of each four."""
    found = drawn(llama, (10,) * 24, n=2, max_batch_tokens=4 * (10 + 2 * 12), stop_tokens=["a", "b", "c"])
    longest = [max(len(ids) for ids, _ in group) - 1 for group in found]
    assert len(held) < 0.8 * sum(max(longest[i : i + 4]) for i in range(0, 24, 4))
    assert max(tokens for _, tokens in held) == 4 * (10 + 2 * 12)


def test_long_and_short_limits(llama: PackedModel) -> None:
    """Rows whose limits differ: positions end at 64."""
    found = drawn(llama, (60, 50, 4), max_new_tokens=30, suppress_tokens=[EOS])
    assert [[len(ids) for ids, _ in group] for group in found] == [[4] * 3, [14] * 3, [30] * 3]
    for group, response in zip(prompts(60, 50, 4), found, strict=True):
        for ids, logp in response:
            expected = torch.tensor(plain_logits_without(llama, group.prompt_ids, ids))
            assert logp == pytest.approx(expected.tolist(), abs=1e-5)


def plain_logits_without(packed: PackedModel, prompt: list[int], response: list[int]) -> list[float]:
    """Log-probs where the end token cannot be drawn: p / (1 - p(end))."""
    ends = [plain_logp(packed.network, prompt + response[:i], [EOS])[0] for i in range(len(response))]
    plain = plain_logp(packed.network, prompt, response)
    return [x - torch.tensor(end).exp().neg().log1p().item() for x, end in zip(plain, ends, strict=True)]


# ---------------------------------------------------------------------- memory, adapters, compiled steps


def test_nothing_is_lost_where_memory_runs_out(
    llama: PackedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = drawn(llama)
    append = ContinuousDecoding.append
    steps: list[int] = []

    def starved(self: ContinuousDecoding, token_R: Tensor) -> None:
        if len(token_R) > 4:
            raise torch.OutOfMemoryError("out of memory")
        steps.append(len(token_R))
        append(self, token_R)

    class Recorded(Queue):
        def __init__(self, rows: Sequence[Row], max_batch_tokens: int, *rest: Any) -> None:
            budgets.append(max_batch_tokens)
            super().__init__(rows, max_batch_tokens, *rest)

    budgets: list[int] = []
    monkeypatch.setattr(local, "Queue", Recorded)
    monkeypatch.setattr(ContinuousDecoding, "append", starved)
    with caplog.at_level(logging.WARNING):
        check_same(drawn(llama, max_batch_tokens=1500), expected)
    assert budgets[:4] == [1500, 1500, 700, 300], "what the rows need, all, 7 of 15 parts, 3 of 15"
    assert [r.message for r in caplog.records] == [
        "out of memory in sampling with a batch of 15: done in halves",
        "out of memory in sampling with a batch of 7: done in halves",
    ]
    assert max(steps) == 3
    monkeypatch.setattr(ContinuousDecoding, "admit", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(AlignlabError, match="out of memory in sampling, with a single item"):
        drawn(llama)


def test_an_adapter_is_multiplied_out_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from alignlab.models import LoRA, ModelSettings, load_model
    from alignlab.models.lora import FusedLinear
    from tests.rollout.tiny import network, tokenizer

    network("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    packed = load_model(ModelSettings(path=str(tmp_path)), adapter=LoRA(r=4))
    for name, parameter in packed.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    layers = [m for m in packed.network.modules() if isinstance(m, FusedLinear)]
    inside = []
    append = ContinuousDecoding.append

    def watched(self: ContinuousDecoding, token_R: Tensor) -> None:
        inside.append(all(layer.held is not None for layer in layers))
        append(self, token_R)

    monkeypatch.setattr(ContinuousDecoding, "append", watched)
    found = drawn(packed)
    assert layers and inside and all(inside)
    assert all(layer.held is None for layer in layers)
    for group, responses in zip(prompts(*LENGTHS), found, strict=True):
        for ids, logp in responses:
            assert logp == pytest.approx(plain_logp(packed.network, group.prompt_ids, ids), abs=1e-5)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compile without the compiler: the step is captured as a graph, whose shapes are fixed, and run as it is."""
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    made = torch.compile(continuous._forward, dynamic=False, backend=backend, fullgraph=True)
    monkeypatch.setattr(continuous, "_compiled", lambda: made)
    yield graphs
    torch._dynamo.reset()


def test_a_compiled_step_changes_nothing(captured: list[int]) -> None:
    packed = model("qwen2")
    expected = drawn(packed, (2, 13, 7, 13, 30, 9, 9), n=4)
    check_same(drawn(packed, (2, 13, 7, 13, 30, 9, 9), n=4, compile=True), expected)
    once = len(captured)
    assert 1 <= once <= 8, "one for each power of two rows"
    check_same(drawn(packed, (2, 13, 7, 13, 30, 9, 9), n=4, compile=True), expected)
    assert len(captured) == once, "nothing is compiled twice"


def test_what_cannot_be_compiled_is_said(caplog: pytest.LogCaptureFixture) -> None:
    packed = model("bloom")
    with caplog.at_level(logging.WARNING):
        check_same(drawn(packed, compile=True), drawn(packed))
    assert "rollout.compile: BloomForCausalLM is not compiled" in caplog.text


def test_networks_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    trial = continuous._try
    monkeypatch.setattr(continuous, "_try", lambda packed: tried.append(packed) or trial(packed))
    packed = model("llama")
    for _ in range(2):
        drawn(packed, (3,), n=1)
    assert tried == [packed]


def test_a_network_that_ignores_plans_is_found_out() -> None:
    """Its own attention would see every token of a varlen row."""
    packed = model("llama")
    forward = packed.base.forward
    packed.base.forward = lambda input_ids, position_ids=None, logits_to_keep=0, **_: forward(
        input_ids=input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, use_cache=False
    )
    assert not takes_plans(packed, 40)
    assert packed.base.config._attn_implementation == "sdpa"
    assert local.takes_plans is takes_plans


def test_prompts_are_read_by_flex_attention_as_on_gpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same is drawn; where it fails, that is said with the reason, once, and a lack of memory is no such reason."""
    expected = drawn(model("qwen2"))
    read: list[int] = []
    attend = FlexPlan.attend
    monkeypatch.setattr(FlexPlan, "attend", lambda plan, *given: read.append(given[1].shape[2]) or attend(plan, *given))
    with tiny.flex_on_cpu():
        packed = model("qwen2")
        assert takes_plans(packed, 64)
        read.clear()
        check_same(drawn(packed), expected)
        assert read == [sum(LENGTHS)] * packed.config.num_hidden_layers, "all prompts at once, in each layer"

    def fails(plan: FlexPlan, *given: Any) -> Tensor:
        raise AlignlabError("no kernel of this size")

    monkeypatch.setattr(FlexPlan, "attend", fails)
    with tiny.flex_on_cpu(), caplog.at_level(logging.WARNING):
        packed = model("qwen2")
        for _ in range(2):
            check_same(drawn(packed), expected)
    said = [r.message for r in caplog.records if "own cache" in r.message]
    assert said == ["Qwen2ForCausalLM is sampled from through transformers' own cache: no kernel of this size"]
    monkeypatch.setattr(FlexPlan, "attend", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with tiny.flex_on_cpu(), pytest.raises(torch.OutOfMemoryError):
        takes_plans(model("qwen2"), 64)


def test_products_are_quick_while_drawing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "LARGE", 1)
    packed = model("llama")
    expected = drawn(model("llama"), max_new_tokens=30)
    check_same(drawn(packed, max_new_tokens=30), expected)
    assert not any("forward" in vars(module) for module in packed.network.modules())
