"""Loading: what is trained, in which precision, with which head and pad token, and what is said when it cannot be."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignlab.core import AdapterKind, ConfigError, Group, Response
from alignlab.models import (
    LoRA,
    ModelSettings,
    PackedModel,
    QuantizationSettings,
    load_model,
    load_tokenizer,
    save_model,
)
from tests import components, tiny

LORA = LoRA(r=4, alpha=8)
Saved = Callable[..., Path]


def load(path: Path, adapter: AdapterKind | None = None, kind: str = "policy", **settings: Any) -> PackedModel:
    return load_model(ModelSettings(path=str(path), **settings), adapter, kind)  # type: ignore[arg-type]


def trained(model: PackedModel) -> set[str]:
    return {n for n, p in model.network.named_parameters() if p.requires_grad}


def every(model: PackedModel) -> set[str]:
    return {n for n, _ in model.network.named_parameters()}


def logp(model: PackedModel) -> torch.Tensor:
    return torch.cat(model.outputs(tiny.some_groups())["logp"])


# What is trained


def test_full(saved: Saved) -> None:
    model = load(saved())
    assert trained(model) == every(model)
    assert (model.layout, model.kind, model.notes) == ("varlen", "policy", [])
    with torch.no_grad():
        expected = tiny.plain_log_probs(tiny.network(), tiny.some_groups())
    torch.testing.assert_close(logp(model), expected, atol=1e-5, rtol=0)


def test_not_trainable(saved: Saved) -> None:
    for adapter in (None, LORA):
        model = load_model(ModelSettings(path=str(saved())), adapter, trainable=False)
        assert trained(model) == set()
        assert not hasattr(model.network, "peft_config"), "nothing to train needs no adapter"


def test_a_new_adapter_alone_is_trained_and_changes_nothing_yet(saved: Saved) -> None:
    model = load(saved(), LORA)
    assert trained(model) == {n for n in every(model) if "lora_" in n}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {n.split(".")[-4] for n in trained(model)} == linear, "all linear layers but the head"
    assert torch.equal(logp(model), logp(load(saved())))


def test_adapter_settings_arrive(saved: Saved) -> None:
    for rslora, scale in ((False, 6 / 4), (True, 6 / math.sqrt(4))):
        adapter = LoRA(r=4, alpha=6, dropout=0.25, targets=["q_proj"], rslora=rslora)
        model = load(saved(), adapter)
        assert {n.split(".")[-4] for n in trained(model)} == {"q_proj"}
        layer = model.base.model.layers[0].self_attn.q_proj
        assert layer.lora_A["default"].weight.shape == (4, 32)
        assert layer.scaling["default"] == pytest.approx(scale)
        assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("kind", "labels"), [("score", 1), ("step", 3)])
def test_a_new_head_is_trained_too(saved: Saved, kind: str, labels: int, adapter: AdapterKind | None) -> None:
    settings = ModelSettings(path=str(saved()))

    def made(seed: int) -> PackedModel:
        return load_model(settings, adapter, kind, labels=labels, seed=seed)  # type: ignore[arg-type]

    model = made(0)
    assert next(p for p in model.head.parameters() if p.requires_grad).shape == (labels, 32)
    assert not any("lora" in n for n, _ in model.head.named_parameters()), "a head is trained whole"
    if adapter is None:
        assert trained(model) == every(model)
    else:
        head = {n for n in every(model) if "modules_to_save.default" in n}
        assert head
        assert trained(model) == head | {n for n in every(model) if "lora_" in n}

    def head_of(model: PackedModel) -> torch.Tensor:
        return next(p for p in model.head.parameters() if p.requires_grad)

    assert torch.equal(head_of(made(1)), head_of(made(1)))
    assert not torch.equal(head_of(made(1)), head_of(made(2)))


def test_frozen_by_name(saved: Saved) -> None:
    model = load(saved(), freeze=[r"layers\.0\.mlp", "^lm_head"])
    still = every(model) - trained(model)
    assert still == {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")} | {"lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "embeddings"),
    [
        ("llama", {"model.embed_tokens.weight"}),
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"}),
        ("opt", {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"}),
        ("gpt_neox", {"gpt_neox.embed_in.weight"}),
        ("mamba", {"backbone.embeddings.weight"}),
    ],
)
def test_frozen_from_the_bottom(saved: Saved, name: str, embeddings: set[str]) -> None:
    model = load(saved(name), freeze_layers=1)
    still = every(model) - trained(model)
    first = {n for n in every(model) if ".layers.0." in n or ".h.0." in n}
    assert len(first) > 4
    assert still == first | embeddings


def test_frozen_weights_do_not_move(saved: Saved) -> None:
    model = load(saved(), freeze_layers=1)
    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(model.lay_out(tiny.some_groups()))["logp_T"].sum().backward()
    optimizer.step()
    moved = {n for n, p in model.network.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"freeze": ["transformer"]},
            r"^model\.freeze: no parameter matches 'transformer'; the first are model\.embed",
        ),
        ({"freeze_layers": 3}, r"^model\.freeze_layers=3: the model has 2 layers$"),
        ({"freeze": [""]}, r"^model\.freeze: nothing is left to train$"),
    ],
)
def test_freezing_that_cannot_be(saved: Saved, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(saved(), **settings)


@pytest.mark.parametrize("settings", [{"freeze_layers": 1}, {"freeze": ["mlp"]}])
def test_freezing_beside_an_adapter_is_not_passed_over(saved: Saved, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.freeze: with an adapter .*adapter\.targets"):
        load(saved(), LORA, **settings)


# Saved adapters


@pytest.fixture(scope="module")
def adapter_folder(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learnt something."""
    model = load(saved(), LORA)
    with torch.no_grad():
        for name, p in model.network.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    folder = tmp_path_factory.mktemp("adapter") / "model"
    save_model(model, folder)
    (folder / "expected.json").write_text(json.dumps(logp(model).tolist()))
    return folder


@pytest.mark.parametrize(("adapter", "trainable"), [(None, True), (None, False), (LORA, True), (LORA, False)], ids=str)
def test_a_saved_adapter_is_merged_or_trained_further(
    adapter_folder: Path, adapter: AdapterKind | None, trainable: bool
) -> None:
    model = load_model(ModelSettings(path=str(adapter_folder)), adapter, trainable=trainable)
    expected = torch.tensor(json.loads((adapter_folder / "expected.json").read_text()))
    torch.testing.assert_close(logp(model), expected, atol=1e-5, rtol=0)
    if not trainable:
        assert trained(model) == set()
    elif adapter is None:
        assert not hasattr(model.network, "peft_config")
        assert trained(model) == every(model), "the merged model's own weights are trained"
    else:
        assert trained(model) == {n for n in every(model) if "lora_" in n}


def test_an_adapter_of_another_kind(adapter_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.path=.*trained as CAUSAL_LM, a score model is wanted.*merged"):
        load(adapter_folder, LORA, kind="score")


def test_an_adapter_whose_base_is_gone(adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(adapter_folder, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute(), "found from any working folder"
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    one_line(lambda: load(folder), "model.path", str(folder), "its base='/nowhere/base': there is no such folder")


# Precision, layout, attention, dropout, checkpointing


def test_precision(saved: Saved, tmp_path: Path) -> None:
    assert load(saved()).dtype == torch.float32
    assert load(saved(), dtype="float64").dtype == torch.float64
    assert load(saved(), dtype="bfloat16").dtype == torch.bfloat16
    half = load(saved(), dtype="bfloat16")
    save_model(half, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load(tmp_path / "half").dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def test_heads_are_float32_at_least(saved: Saved) -> None:
    for dtype, expected in (("bfloat16", torch.float32), ("float64", torch.float64)):
        model = load(saved(), kind="score", dtype=dtype)
        assert next(model.head.parameters()).dtype == expected
        assert model.outputs(tiny.some_groups(), ("score",))["score"][0].dtype == torch.float32


@pytest.mark.parametrize(("kind", "labels"), [("score", 1), ("step", 3)])
@pytest.mark.parametrize("held", ["whole", "shards", "nf4", "adapter"])
@torch.no_grad()
def test_heads_come_back_to_the_bit(tmp_path: Path, kind: str, labels: int, held: str) -> None:
    """Beside a base in bfloat16, in which transformers reads all of a file."""
    if held == "nf4":
        components.need("bitsandbytes")
    tiny.save(tmp_path / "base", **tiny.QUANTIZABLE)
    half = {"dtype": "bfloat16", "layout": "packed"}

    def read(path: Path, adapter: AdapterKind | None, quantization: str = "none") -> PackedModel:
        settings = ModelSettings(path=str(path), **half)
        return load_model(settings, adapter, kind, labels=labels, quantization=QuantizationSettings(kind=quantization))

    model = read(tmp_path / "base", LORA if held == "adapter" else None)
    weight = next(p for n, p in model.head.named_parameters() if p.requires_grad)
    weight.copy_(torch.linspace(0.1, 0.3, weight.numel()).view_as(weight))
    save_model(model, tmp_path / "model")
    if held == "shards":
        model.network.save_pretrained(tmp_path / "model", max_shard_size="20KB")
        (tmp_path / "model/model.safetensors").unlink(missing_ok=True)
        assert (tmp_path / "model/model.safetensors.index.json").exists()
    adapter, quantization = (LORA, "nf4") if held == "nf4" else (None if held != "adapter" else LORA, "none")
    again = read(tmp_path / "model", adapter, quantization)
    found = [p for n, p in again.head.named_parameters() if n.endswith("weight")]
    assert weight.dtype == torch.float32 and any(p.dtype == weight.dtype and torch.equal(p, weight) for p in found)


@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_a_layout_asked_for_is_taken_without_trial(saved: Saved, layout: str) -> None:
    model = load(saved("bloom"), layout=layout)
    assert (model.layout, model.notes) == (layout, [])


def test_attention(saved: Saved) -> None:
    assert load(saved(), layout="packed").config._attn_implementation == "sdpa"
    assert load(saved(), attention="eager").config._attn_implementation == "eager"
    assert load(saved("gemma2"), attention="sdpa").config._attn_implementation == "eager", "it has no other"


DROPOUT = {
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_off_in_training_unless_asked_for(saved: Saved, name: str) -> None:
    folder, groups = saved(name, **DROPOUT[name]), tiny.some_groups()
    for keep in (False, True):
        model = load(folder, dropout=keep)
        expected = model(model.lay_out(groups))["logp_T"]
        model.train()
        found = [model(model.lay_out(groups))["logp_T"] for _ in range(2)]
        assert torch.equal(found[0], expected) != keep
        assert torch.equal(found[0], found[1]) != keep


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(saved: Saved, adapter: AdapterKind | None) -> None:
    found = []
    for checkpointing in (False, True):
        model = load(saved(), adapter, gradient_checkpointing=checkpointing).train()
        assert model.base.is_gradient_checkpointing == checkpointing
        value = model(model.lay_out(tiny.some_groups()))["logp_T"].sum()
        found.append(tiny.gradients(model.network, value))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5)


def test_the_tokenizer_may_be_another(saved: Saved, tmp_path: Path) -> None:
    tiny.tokenizer(eos_token="z").save_pretrained(tmp_path)
    settings = ModelSettings(path=str(saved()), tokenizer=str(tmp_path))
    assert load_tokenizer(settings).eos_token == "z"
    assert load_model(settings).tokenizer.eos_token == "z"


# The pad token, and where a classifier looks


BARE = {"unk_token": None, "bos_token": None}
NONE: dict[str, Any] = {"pad_token_id": None}


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({}, "<pad>"),
        ({"pad_token": "</s>"}, "<unk>"),
        ({"pad_token": None}, "<unk>"),
        ({"pad_token": "</s>", "unk_token": None}, "<s>"),
        ({"pad_token": "</s>", "unk_token": "</s>"}, "<s>"),
        ({"pad_token": "</s>", **BARE}, "</s>"),  # like GPT-2: there is no other token
        ({"pad_token": None, **BARE}, "</s>"),
    ],
)
def test_padding_is_not_the_end_token_where_it_can_be_helped(
    tmp_path: Path, special: dict[str, str | None], expected: str
) -> None:
    folder = tiny.save(tmp_path, special=special, **NONE)
    for kind in ("policy", "score"):
        model = load(folder, kind=kind)
        assert model.tokenizer.pad_token == expected
        assert model.config.pad_token_id == model.pad_id == tiny.VOCABULARY.index(expected)
    assert load(folder).network.generation_config.pad_token_id == model.pad_id


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_classifier_keeps_the_pad_token_of_its_config(tmp_path: Path, adapter: AdapterKind | None) -> None:
    """Loaded by others, an adapter's base has the config it has: they would look for the score elsewhere."""
    folder = tiny.save(tmp_path, special={"pad_token": "</s>"}, pad_token_id=tiny.EOS)
    model = load(folder, adapter, kind="score")
    assert model.config.pad_token_id == model.tokenizer.pad_token_id == tiny.EOS
    assert load(folder).tokenizer.pad_token == "<unk>", "a policy has no such trouble"


@pytest.mark.parametrize("pad", [tiny.PAD, tiny.EOS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_score_is_read_where_transformers_reads_it(tmp_path: Path, pad: int, side: str) -> None:
    """A batch padded by the tokenizer through the classifier's own forward; responses end in EOS, or do not, or are
    nothing else."""
    folder = tiny.save(tmp_path, kind="score", special={"pad_token": tiny.VOCABULARY[pad], **BARE}, pad_token_id=pad)
    model, eos = load(folder, kind="score"), tiny.EOS
    assert model.pad_id == pad
    groups = [
        Group([5, 6, 7], [Response([8, 9, eos]), Response([8, 9]), Response([eos]), Response([8, eos, eos])]),
        Group([9], [Response([eos, 8, 4, 4, 5])]),
    ]
    sequences = [g.prompt_ids + r.token_ids for g in groups for r in g.responses]
    tokenizer = model.tokenizer
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    with torch.no_grad():
        expected = model.network(**batch).logits[:, 0]
    for model.layout in ("packed", "plain"):
        scores = torch.stack(model.outputs(groups, ("score",))["score"])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    same = torch.isclose(scores[0], scores[1])
    assert bool(same) == (pad == eos), "where padding is the end token, transformers skips the end token"


# What is said when it cannot be


def one_line(load_it: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_it()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{parts[0]}={parts[1]!r}: "), message
    assert all(p in message for p in parts[2:]), message


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "../nowhere/model", "runs/nowhere/model"])
def test_no_such_folder(path: str) -> None:
    one_line(lambda: load(Path(path) if path[0] == "/" else path), "model.path", path, "there is no such folder")  # type: ignore[arg-type]


def test_what_may_be_a_hub_id() -> None:
    one_line(lambda: load("no-one/no-model"), "model.path", "no-one/no-model", "no such folder, nor", "Hub")  # type: ignore[arg-type]


def test_a_folder_without_tokenizer_or_model(saved: Saved, tmp_path: Path) -> None:
    one_line(lambda: load(tmp_path), "model.path", str(tmp_path), "there is no model in it", "config.json")
    tiny.tokenizer().save_pretrained(tmp_path)
    one_line(lambda: load(tmp_path), "model.path", str(tmp_path), "there is no model in it", "config.json")
    tiny.network().save_pretrained(tmp_path / "m")
    one_line(lambda: load(tmp_path / "m"), "model.path", str(tmp_path / "m"), "no tokenizer", "model.tokenizer")
    one_line(lambda: load(saved(), tokenizer="/nowhere"), "model.tokenizer", "/nowhere", "there is no such folder")


def test_damaged_weights(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not weights")
    one_line(
        lambda: load(tmp_path / "m"), "model.path", str(tmp_path / "m"), "model.safetensors is no safetensors file"
    )


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
    ],
)
def test_what_older_versions_of_transformers_saved_too_is_no_weight(
    name: str, buffers: list[str], saved: Saved, tmp_path: Path
) -> None:
    file = Path(shutil.copytree(saved(name), tmp_path / "m")) / "model.safetensors"
    whole = torch.ones(4, 4, dtype=torch.bool)
    save_file(load_file(file) | {n: whole.clone() for n in buffers}, file, metadata={"format": "pt"})
    assert torch.equal(logp(load(tmp_path / "m")), logp(load(saved(name))))


def test_a_reward_model_is_no_policy(saved: Saved) -> None:
    """Transformers would give it a random head and go on."""
    folder = saved("llama", "score")
    one_line(lambda: load(folder), "model.path", str(folder), "not a policy model", "lm_head.weight")


def test_a_step_model_with_other_labels(saved: Saved) -> None:
    folder = saved("llama", "step")
    settings = ModelSettings(path=str(folder))
    one_line(
        lambda: load_model(settings, kind="step", labels=2),
        "model.path",
        str(folder),
        "not a step model",
        "score.weight of shape (3, 32)",
    )


@pytest.mark.parametrize("targets", [["query"], "quer.*"])
def test_targets_that_are_not_there(saved: Saved, targets: Any) -> None:
    adapter = LoRA(targets=targets)
    with pytest.raises(ConfigError, match=r"^adapter\.targets=.*quer[^\n]*$"):
        load(saved(), adapter)


@pytest.mark.parametrize("kind", ["score", "step"])
def test_a_classifier_starts_from_the_trunk_of_a_language_model_s_adapter(
    kind: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Its hidden states are those of the policy with its adapter, not of the bare base."""
    base = ModelSettings(path=str(saved()))
    policy = load_model(base, LoRA(r=4))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.2
    save_model(policy, tmp_path / "sft")
    start = ModelSettings(path=str(tmp_path / "sft"))
    model = load_model(start, kind=kind)  # type: ignore[arg-type]
    ids = torch.tensor([[5, 9, 7, 4]])

    def hidden(of: PackedModel) -> torch.Tensor:
        return of.decoder(input_ids=ids, use_cache=False).last_hidden_state

    assert not torch.allclose(hidden(load_model(base)), hidden(policy), atol=1e-2)
    torch.testing.assert_close(hidden(model), hidden(policy), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="save_model=merged"):
        load_model(start, LoRA(), kind)  # type: ignore[arg-type]
