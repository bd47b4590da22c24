"""Making the base model: cached, whole or not at all, the same weights every time, a good model of the process."""

import time
from functools import partial
from pathlib import Path

import pytest
import torch

from alignlab.benchmarks.exact import (
    ExactWorld,
    ExactWorldSettings,
    completion_log_probs,
    metrics,
    process_log_probs,
)
from alignlab.benchmarks.exact import base_model as module
from alignlab.benchmarks.exact.base_model import BaseModelSettings, base_model
from alignlab.core import AlignlabError
from tests.training import forks

BRIEF = BaseModelSettings(steps=3, batch_size=12)


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    return ExactWorld()


def test_it_learns_the_process(world):
    """A fraction of the usual training leaves little to learn, compared with a model that ignores the prompt."""
    network = module.pretrain(world, BaseModelSettings(steps=120, batch_size=240))
    logp_XY = completion_log_probs(network, world)
    process = process_log_probs(world)
    ignorant = process.exp().mean(0).log().expand_as(process)
    assert metrics.kl_divergence(process, logp_XY) < 0.2 * metrics.kl_divergence(process, ignorant)
    assert 6 < metrics.entropy(logp_XY) < 7.2
    assert not network.training


def test_plain_transformers_loads_it_and_it_is_made_once(world, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base_model(world, BRIEF, tmp_path)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    logp_XY = completion_log_probs(network, world)
    torch.testing.assert_close(logp_XY, completion_log_probs(module.pretrain(world, BRIEF), world))
    batch = tokenizer(world.prompt_texts, return_tensors="pt")
    sampled = network.generate(**batch)[:, 2:]
    assert sampled.shape[1] <= 4
    assert network.generation_config.eos_token_id == tokenizer.eos_token_id == 11

    monkeypatch.setattr(module, "pretrain", None)  # would fail if it were made again
    assert base_model(world, BRIEF, tmp_path) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_same_weights_every_time_and_nothing_else_disturbed(world, two_threads):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = module.pretrain(world, BRIEF).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    torch.manual_seed(2)
    again = module.pretrain(world, BRIEF).state_dict()
    other = module.pretrain(world, BaseModelSettings(steps=3, batch_size=12, seed=1)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_other_settings_have_another_folder(world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "pretrain", lambda world, settings: world.tokenizer())  # quick; saves something
    other_world = ExactWorld(ExactWorldSettings(seed=1))
    folders = {
        base_model(world, BRIEF, tmp_path),
        base_model(world, BaseModelSettings(steps=4, batch_size=12), tmp_path),
        base_model(other_world, BRIEF, tmp_path),
    }
    assert len(folders) == 3
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    assert base_model(world, BRIEF) in folders


def test_a_failure_leaves_nothing_behind(world, tmp_path, monkeypatch):
    def interrupted(world, settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base_model(world, BRIEF, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(world, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AlignlabError, match=r"file/cache.*ALIGNLAB_CACHE"):
        base_model(world, BRIEF, tmp_path / "file" / "cache")


def test_two_processes_at_the_same_time(world, tmp_path):
    """Each is held back, its model made, until the other has made its own: both then want to put it in place."""
    original = module.pretrain

    def make(name: str) -> None:
        def together(*arguments):
            network = original(*arguments)
            (tmp_path / f"ready-{name}").touch()
            limit = time.time() + 120
            while len(list(tmp_path.glob("ready-*"))) < 2 and time.time() < limit:
                time.sleep(0.01)
            return network

        module.pretrain = together
        print(base_model(world, BaseModelSettings(steps=3, batch_size=12), tmp_path / "cache"))

    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    processes = [forks.fork(partial(make, log.stem), log) for log in logs]
    statuses, outputs = [forks.wait(pid) for pid in processes], [log.read_text() for log in logs]
    assert statuses == [0, 0], outputs
    assert len(list(tmp_path.glob("ready-*"))) == 2
    folders = {output.strip().splitlines()[-1] for output in outputs}
    assert folders == {str(path) for path in (tmp_path / "cache").iterdir()}
    assert len(folders) == 1
    assert (Path(folders.pop()) / "model.safetensors").is_file()
