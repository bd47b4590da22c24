"""Traps that other projects fell into, each with a test that would catch it here.

Whose they were is said where it could be verified, in threads of their repositories or in their code. Many are tested
where they belong; this is the whole list.

Whitening that adds the mean back (THUDM/slime issue 1369):
    algorithms/test_policy_gradient.py::test_whitening_removes_the_mean
    algorithms/test_ppo.py::test_advantages_have_mean_0_and_variance_1
Whitening by the process (THUDM/slime pull 2235), or by the minibatch:
    traps/test_traps_in_runs.py::test_whitening_per_process
    algorithms/test_ppo.py::test_advantages_are_whitened_once_for_the_whole_iteration
A value head initialised at 1/(D+1), as in OpenRLHF's model.py, instead of 1/√(D+1):
    models/test_heads.py::test_weights_have_the_right_spread
IPO that is NaN, or anything but 1/(4β²), where the policy is the reference:
    algorithms/test_preference_family.py::test_ipo_of_the_reference_itself_is_finite
    traps/test_traps_in_runs.py::test_step_0
Label smoothing dropped on one path (TRL's IPO took no notice of it: huggingface/trl pull 1035):
    traps/test_traps.py::test_label_smoothing_dropped_on_one_path
    algorithms/test_preference_family.py::test_label_smoothing_reaches_every_kind_of_label
    algorithms/test_preference_family.py::test_a_soft_label_is_the_mean_over_both_orders
An end token cut off after it was appended (huggingface/trl pull 4698), and nothing knowing of it:
    data/test_lengths.py::test_a_response_that_loses_its_end_token_is_unfinished
    algorithms/test_pairwise_model.py::test_a_response_that_was_cut_is_not_finished
An end token masked since it is the padding too (huggingface/trl issue 1623):
    traps/test_traps.py::test_eos_masked_as_padding
    models/test_load.py::test_padding_is_not_the_end_token_where_it_can_be_helped
A reference in lower precision, so that rewards are not 0 at step 0 (eric-mitchell/direct-preference-optimization 34):
    traps/test_traps_in_runs.py::test_step_0
Dropout left on in log-prob passes (huggingface/trl issue 4, hiyouga/LlamaFactory pull 10779):
    traps/test_traps_in_runs.py::test_dropout_in_log_probs
    models/test_forward.py::test_outputs_switch_dropout_off_and_put_the_mode_back
    rollout/test_local.py::test_no_dropout_no_gradient_and_the_mode_restored
Temperature in sampling and not in log-probs (huggingface/trl pull 3029, NVIDIA/NeMo-Aligner issue 46):
    traps/test_traps_in_runs.py::test_temperature_and_old_log_probs
    models/test_forward.py::test_temperature
A head lost on reload (huggingface/trl issue 1379, OpenRLHF/OpenRLHF pull 1342):
    models/test_save.py::test_plain_transformers_and_peft_say_the_same
    models/test_heads.py::test_saved_and_found_again
    algorithms/test_reward_models.py::test_a_trained_reward_model_scores_alike_in_plain_transformers
    scoring/test_process_reward.py::test_a_trained_one_reloads_everywhere
    traps/test_traps.py::test_a_merged_step_head_lost
    traps/test_traps.py::test_a_merged_value_head_lost
A batch without a loss-bearing token, or without a pair, that reports a loss of 0 (huggingface/trl issue 6668):
    traps/test_traps_in_runs.py::test_nothing_to_learn
    traps/test_traps_in_runs.py::test_pairs_without_a_winner
    training/test_loop.py::test_nothing_to_learn_is_said_not_reported_as_zero
A loss averaged by the micro-batch, not over the global batch's tokens (verl-project/verl pull 906):
    core/test_interface.py::test_aggregate_is_the_global_mean_however_the_batch_is_split
    training/test_loop.py::test_micro_batches_do_not_matter
Lengths that count the padding, or the prompt (RRHF's own code):
    algorithms/test_ranking_losses.py::test_rrhf_counts_loss_bearing_tokens
    training/test_loop.py::test_padding_does_not_matter
Masks off by one (EleutherAI/gpt-neox pull 1285, jingyaogong/minimind pull 621):
    traps/test_traps.py::test_masks_off_by_one
    models/test_forward.py::test_packed_log_probs_and_gradients
    models/test_heads.py::test_values_are_those_of_the_state_that_predicts_the_token
    data/test_encode.py::test_chat_mask_is_that_of_transformers
The outcome's reward on the padding after the end (huggingface/trl issue 3750):
    algorithms/test_policy_gradient.py::test_scores_go_to_last_tokens_and_steps_where_they_are
GAE that runs on into the next response:
    algorithms/test_policy_gradient.py::test_gae_is_the_sum_of_its_definition
A missing end token looked for in the prompt too (huggingface/trl issue 6805), or where the padding is one:
    traps/test_traps.py::test_missing_eos
    rollout/test_stopping.py::test_end_token_at_the_limit_is_finished
A baseline by the micro-batch (for BCO: huggingface/trl issue 7265), in KTO:
    algorithms/test_kto.py::test_the_baseline_does_not_depend_on_the_split_of_the_batch
Old log-probs of an earlier iteration; a reference that is trained along:
    traps/test_traps_in_runs.py::test_temperature_and_old_log_probs
    models/test_reference.py::test_of_trained_weights_it_is_a_frozen_copy
    models/test_reference.py::test_of_an_adapter_trained_further_it_is_the_adapter_as_it_was
A gradient through old log-probs, the reference's, advantages or a baseline:
    traps/test_traps.py::test_columns_have_no_gradient
    algorithms/test_kto.py::test_the_baseline_has_no_gradient
A group of equal rewards that gives NaN:
    algorithms/test_reinforce.py::test_groups_of_equal_rewards_are_counted_as_uninformative
    core/test_ragged.py::test_empty_single_and_equal_items_have_finite_gradients
The worst of N instead of the best:
    algorithms/test_likelihood.py::test_best_equals_argmax
    rollout/test_local.py::test_best_of
    core/test_order.py::test_the_first_column_in_order_of_precedence_decides
An adapter left off after a pass, the critic's left on, or weights frozen or freed by it (huggingface/peft issue 3447):
    traps/test_traps.py::test_adapters_left_as_they_should_not_be
    models/test_reference.py::test_the_adapter_is_on_again_after_an_error
    models/test_heads.py::test_a_critic_of_its_own_shares_no_weight_that_is_trained
BOS twice, from the tokenizer and from the template:
    data/test_encode.py::test_a_bos_that_the_template_writes_is_not_doubled_and_one_it_leaves_out_not_added
The same samples on every process:
    training/distributed/test_modes.py::test_two_processes_equal_one
    rollout/test_local.py::test_a_response_depends_on_seed_prompt_and_index_alone
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alignlab.algorithms
from alignlab.algorithms.ppo import PPO
from alignlab.core import Algorithm, Batch, Group, Outputs, Response
from alignlab.data import DataSettings, load
from alignlab.models import LoRA, ModelSettings, Reference, add_value_head, load_model, save_model
from alignlab.rollout import LocalRollout
from tests import tiny
from tests.algorithms.common import Known, group

Saved = Callable[..., Path]
LORA = LoRA(r=4, alpha=8)


def test_the_list_is_right() -> None:
    """Every test it names is there."""
    here = Path(__file__).parents[1]
    named = re.findall(r"^    (\S+\.py)::(test_\w+)$", __doc__ or "", re.MULTILINE)
    assert len(named) > 50
    for file, test in named:
        assert f"def {test}(" in (here / file).read_text(), f"{file}::{test}"


def shaken(model: Any, seed: int = 1) -> Any:
    """Every weight that is trained moved a little, as by training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


# ------------------------------------------------------------------ labels

LABELS: dict[str, tuple[float, float]] = {
    "score": (3.0, 1.0), "reward": (0.5, 0.25), "preference": (0.8, 0.2), "lost_to": (-1.0, 0.0)
}  # fmt: skip


def algorithms() -> list[type[Algorithm]]:
    """Every algorithm there is."""
    names = [m.name for m in pkgutil.iter_modules(alignlab.algorithms.__path__)]
    modules = [importlib.import_module(f"alignlab.algorithms.{name}") for name in names]
    kinds = {k for m in modules for k in vars(m).values() if inspect.isclass(k) and issubclass(k, Algorithm)}
    return sorted((k for k in kinds if k.loss is not Algorithm.loss), key=lambda k: k.__name__)


SMOOTHING = [k for k in algorithms() if "label_smoothing" in inspect.signature(k).parameters]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", SMOOTHING, ids=lambda kind: kind.__name__)
def test_label_smoothing_dropped_on_one_path(kind: type[Algorithm], labels: str) -> None:
    """By its definition: the loss expected when each label is turned round with that probability."""

    def found(better: int, **settings: float) -> float:
        values = LABELS[labels] if better == 0 else LABELS[labels][::-1]
        if labels == "lost_to" and better == 1:
            values = (1.0, -1.0)
        known: list[Known] = [{labels: v, "ref_logp": [-1.0, -1.5]} for v in values]
        pair = group(*known, length=2)
        outputs = Outputs(logp_T=torch.tensor([-0.5, -0.25, -2.0, -1.0]), score_N=torch.tensor([0.3, -0.4]))
        return float(kind(**settings).loss(outputs, Batch([pair]))[0].sum())

    there, back = found(0), found(1)
    assert there != pytest.approx(back)
    assert found(0, label_smoothing=0.3) == pytest.approx(0.7 * there + 0.3 * back)


def test_there_is_label_smoothing() -> None:
    assert [k.__name__ for k in SMOOTHING] == ["DPO"]
    assert len(algorithms()) >= 18


# ------------------------------------------------------------------ tokens


def test_eos_masked_as_padding(saved: Saved, tmp_path: Path) -> None:
    """The end token of a tokenizer that pads with it bears loss, in a batch with longer rows too."""
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": "a b", "completion": c}) + "\n" for c in ("c", "d e f g"))
    )
    path = saved(special={"pad_token": "</s>", "unk_token": None, "bos_token": None})
    model = load_model(ModelSettings(path=str(path), layout="plain"))
    assert model.tokenizer.pad_token_id == model.pad_id == tiny.EOS, "there is no other token to pad with"
    groups = load(DataSettings(path=str(tmp_path / "data.jsonl")), model.tokenizer).train
    assert [g.responses[0].token_ids[-1] for g in groups] == [tiny.EOS] * 2
    batch = Batch(groups)
    assert batch.length_N.tolist() == [2, 5] and batch.token_T[[1, 6]].tolist() == [tiny.EOS] * 2
    with torch.no_grad():
        torch.testing.assert_close(model(model.lay_out(groups))["logp_T"], tiny.plain_log_probs(model.network, groups))


@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_masks_off_by_one(layout: str) -> None:
    """The first response token is learned and the last prompt token is not: raising the log-probs of all that bear
    loss raises each of the response's and leaves the prompt's to chance."""
    model = tiny.model(seed=3)
    model.layout = layout  # type: ignore[assignment]
    prompt, response = [5, 9], [20, 21, 22]
    one = Group(prompt, [Response(response)])
    rows = model.lay_out([one])
    assert rows.target_T.tolist() == response
    seen = rows.input_ids_RL.flatten()[rows.predict_T].tolist()
    assert seen == [prompt[-1], *response[:-1]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = tiny.plain_log_probs(model.network, [one, Group([5], [Response([9])])]).detach()
    for _ in range(3):
        (-model(rows)["logp_T"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    change = tiny.plain_log_probs(model.network, [one, Group([5], [Response([9])])]).detach() - before
    assert bool((change[:3] > 0.3).all()) and change[3] < 0.3


def test_missing_eos(saved: Saved) -> None:
    """The prompt holds end tokens, and the padding is one: only what was sampled counts."""
    path = saved(special={"pad_token": "</s>"})
    model = load_model(ModelSettings(path=str(path)), trainable=False)
    prompts = [Group([5, tiny.EOS, 6], origin="p.jsonl:1"), Group([5, tiny.EOS], origin="p.jsonl:2")]
    cut = LocalRollout(max_new_tokens=3, suppress_tokens=["</s>"])
    ended = LocalRollout(max_new_tokens=3, stop_tokens=tiny.WORDS, suppress_tokens=["<pad>", "<unk>", "<s>"])
    for settings, expected in ((cut, -7.0), (ended, 2.0)):
        groups = settings.sampler(model).sample(prompts, 2, seed=0)
        for response in (r for g in groups for r in g.responses):
            known = [0.0] * len(response.token_ids)
            response.columns |= {"reward": 2.0, "old_logp": known, "ref_logp": known, "old_value": known}
        target_T = Batch(PPO(lam=1.0, missing_eos_score=-7.0).prepare(groups))["value_target_T"]
        assert len(target_T) and target_T.tolist() == pytest.approx([expected] * len(target_T))


def test_columns_have_no_gradient() -> None:
    """Whatever fills them in: with a gradient through the past the ratio would be 1 for good."""
    batch = Batch([group({"reward": 1.0}, {"reward": 2.0}, length=2)])
    logp_T = torch.randn(4, requires_grad=True)
    for name in ("old_logp_T", "ref_logp_T", "advantage_T"):
        batch.fill(name, logp_T * 2)
        assert not batch[name].requires_grad
    assert not any(isinstance(v, torch.Tensor) for r in batch.responses for v in r.columns.values())


# ------------------------------------------------------------------ heads and adapters


def test_a_merged_step_head_lost(saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    model = shaken(load_model(ModelSettings(path=str(saved())), LORA, "step", labels=3))
    save_model(model, tmp_path / "model", merge=True)
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([[5, 9, 20, 21]])
    with torch.no_grad():
        expected = model.eval().network(input_ids=ids).logits
        assert float(expected.abs().max()) > 0.1
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("critic", ["shared", pytest.param("own")])
def test_a_merged_value_head_lost(saved: Saved, tmp_path: Path, critic: Any) -> None:
    """A policy folded into its base goes on with the values it had, and is a plain model to anyone else."""
    from transformers import AutoModelForCausalLM

    model = load_model(ModelSettings(path=str(saved())), LORA)
    shaken(model)  # the critic's adapter begins as a copy of the policy's
    add_value_head(model, critic)
    shaken(model, seed=2).eval()
    groups, reads = tiny.some_groups(), ("logp", "value")
    save_model(model, tmp_path / "model", merge=True)
    again = load_model(ModelSettings(path=str(tmp_path / "model")))
    add_value_head(again, critic, seed=9)
    with torch.no_grad():
        expected, found = (m.eval()(m.lay_out(groups), reads) for m in (model, again))
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(tiny.plain_log_probs(plain, groups), expected["logp_T"], atol=1e-4, rtol=1e-4)


def test_adapters_left_as_they_should_not_be(saved: Saved) -> None:
    """Passes of the reference and of the critic, one that fails among them, and the policy is itself again: what it
    says, what is trained, and which adapter is on."""
    model = load_model(ModelSettings(path=str(saved())), LORA)
    reference = Reference(model, fresh_adapter=True)
    add_value_head(model, "own")
    shaken(model).eval()
    groups = tiny.some_groups()
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    expected = torch.cat(model.outputs(groups)["logp"])
    values = torch.cat(model.outputs(groups, ("logp", "value"))["value"])

    def same() -> None:
        assert torch.equal(torch.cat(model.outputs(groups)["logp"]), expected)
        assert torch.equal(torch.cat(model.outputs(groups, ("logp", "value"))["value"]), values)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
        assert model.network.active_adapter == "default"

    with reference.model() as base:
        assert not torch.allclose(torch.cat(base.outputs(groups)["logp"]), expected, atol=0.05)
    same()

    def fails(wanted: str) -> Callable[..., None]:
        def act(*_: Any) -> None:
            if model.network.active_adapter == wanted:
                raise RuntimeError("it failed")

        return act

    hook = model.decoder.register_forward_hook(fails("default"))
    with pytest.raises(RuntimeError, match="it failed"), reference.model() as base:
        base.outputs(groups)
    hook.remove()
    same()
    hook = model.decoder.register_forward_hook(fails("critic"))
    with pytest.raises(RuntimeError, match="it failed"):
        model.outputs(groups, ("value",))
    hook.remove()
    same()
