"""What is wrong with a config is said in one line that begins with the key as one writes it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from alignlab.build import build, locate, section
from alignlab.config import compose, resolve
from alignlab.core import ConfigError
from alignlab.core.settings import Settings


class Inner(Settings):
    width: int = 1


class Outer(Settings):
    steps: int = Field(1, ge=1)
    name: str = "a"
    mode: Literal["auto"] | Literal["on", "off"] = "auto"
    inner: Inner = Inner()
    words: list[str] = Field(default_factory=list)


class Needs(Settings):
    path: str


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Outer, {"stepz": 3}, "training.stepz: unknown key; did you mean 'steps'?"),
        (Outer, {"inner": {"widht": 3}}, "training.inner.widht: unknown key; did you mean 'width'?"),
        (Outer, {"steps": 0}, "training.steps=0: should be greater than or equal to 1"),
        (Outer, {"steps": None}, "training.steps=null: should be a valid integer"),
        (Outer, {"mode": "of"}, "training.mode='of': should be 'auto', or should be 'on' or 'off'"),
        (Outer, {"inner": {"width": "x"}}, "training.inner.width='x': should be a valid integer, unable to parse"),
        (Outer, {"words": ["a", 1]}, "training.words.1=1: should be a valid string"),
        (Outer, None, "training=null: a section with keys is wanted: steps, name, mode, inner, words"),
        (Outer, "fast", "training='fast': a section with keys is wanted"),
        (Needs, {}, "training.path: must be given, as in training.path=VALUE"),
    ],
)
def test_a_section_that_cannot_be(kind: type[Settings], values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        section(kind, values, "training")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_config_itself_as_a_section() -> None:
    assert section(Outer, {"steps": 2}, "") == Outer(steps=2)
    with pytest.raises(ConfigError, match=r"^steps=0: should be"):
        section(Outer, {"steps": 0}, "")
    with pytest.raises(ConfigError, match=r"^path: must be given, as in path=VALUE"):
        section(Needs, {}, "")


# ------------------------------------------------------------------ building what a config names


class Thing:
    """What the configs below build."""

    def __init__(self, first: Any, beta: float, names: tuple[str, ...] = (), part: Thing | None = None) -> None:
        if beta == 13:
            raise RuntimeError("an unlucky number\nand more")
        self.first, self.beta, self.names, self.part = first, beta, names, part


class Nested:
    """Makes settings of a dictionary, as the exact benchmark does."""

    def __init__(self, world: dict[str, Any]) -> None:
        self.world = Outer(**world)


def shout(text: str) -> str:
    return text.upper()


HERE = __name__
THING = f"{HERE}.Thing"


def test_builds_what_is_nested_first_and_passes_arguments_on() -> None:
    config = {"_target_": THING, "beta": 1, "names": ["a", "b"], "part": {"_target_": THING, "first": 0, "beta": "2"}}
    made = build(config, "scoring", "the first")
    # Types are those of the hints: 1 is a float, the list a tuple, "2" a number.
    assert (made.first, made.beta, made.names) == ("the first", 1.0, ("a", "b"))
    assert isinstance(made.beta, float)
    assert (made.part.first, made.part.beta) == (0, 2.0)
    assert build(None, "scoring") is None


def test_a_function_by_name() -> None:
    config = {"_target_": THING, "first": {"_target_": "hydra.utils.get_method", "path": f"{HERE}.shout"}, "beta": 1}
    assert build(config, "scoring").first is shout


def test_what_an_extra_installs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimi", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"no module 'optimi': pip install 'alignlab\[kahan\]'"):
        build({"_target_": "optimi.AdamW"}, "optimizer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_target_": None}, "scoring._target_: must name a class, as in scoring._target_=my_module.MyClass"),
        ({"_target_": "Thing"}, "scoring._target_=Thing: must be written MODULE.NAME"),
        ({"_target_": "nowhere.Thing"}, "there is no module 'nowhere': is its folder on PYTHONPATH?"),
        (
            {"_target_": f"{HERE}.Thingg"},
            f"scoring._target_={HERE}.Thingg: {HERE} has no 'Thingg'; did you mean 'Thing'?",
        ),
        ({"betta": 1}, "scoring.betta: unknown key; did you mean 'beta'?"),
        ({"beta": "abc"}, "scoring.beta='abc': should be a valid number"),
        ({"names": "abc"}, "scoring.names='abc': should be a valid tuple"),
        ({"names": ["a", 1]}, "scoring.names.1=1: should be a valid string"),
        ({"beta": 13}, f"scoring._target_={THING}: RuntimeError: an unlucky number; and more (test_config.py:"),
        ({"part": {"_target_": THING, "first": 1}}, "scoring.part.beta: must be given, as in scoring.part.beta=VALUE"),
        ({"part": {"_target_": THING, "first": 1, "beta": "x"}}, "scoring.part.beta='x': should be a valid number"),
        ({"part": {"_target_": f"{HERE}.shout", "text": "a"}}, "scoring.part=<"),
        ({"part": {"_target_": "torch.load", "f": "a"}}, "scoring.part._target_=torch.load: not a class"),
        ({"part": {"_target_": "subprocess.Popen", "args": "true"}}, "Popen: a class of Python's own library"),
        ({"part": {"_target_": "os.system", "command": "true"}}, "scoring.part._target_=os.system: not a class"),
        ({"first": {"_target_": "hydra.utils.get_method", "path": "no.such.rule"}}, "scoring.first.path=no.such.rule:"),
        ({"first": {"_target_": f"{HERE}.Nested", "world": {"stepz": 1}}}, "scoring.first.world.stepz: unknown key"),
        ({"first": {"_target_": f"{HERE}.Nested", "world": {"steps": 0}}}, "scoring.first.world.steps=0: should be"),
    ],
)
def test_what_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build({"_target_": THING, "first": 1, "beta": 1.0, **changes}, "scoring")
    assert message.removesuffix("<") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_of_the_users_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_broken.py").write_text("x = 1\ndef (:\n")
    (tmp_path / "my_greedy.py").write_text("\nimport a_package_that_is_not_there\n")
    (tmp_path / "my_failing.py").write_text("\n\nX = {}['key']\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, said in (
        ("my_broken", "SyntaxError: "),
        ("my_greedy", "No module named 'a_package_that_is_not_there' (my_greedy.py:2)"),
        ("my_failing", "KeyError: 'key' (my_failing.py:3)"),
    ):
        with pytest.raises(ConfigError, match=rf"^algorithm\._target_={name}\.X: importing {name} failed: ") as error:
            locate(f"{name}.X", "algorithm._target_")
        assert said in str(error.value)
    with pytest.raises(ConfigError, match=r"\(my_broken\.py:2\)$"):
        locate("my_broken.X", "algorithm._target_")


# ------------------------------------------------------------------ composing


def test_a_path_for_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my data.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")

    def of(*words: str) -> tuple[Any, Any, Any]:
        config = resolve(compose("train", ["model.path=m", *words]))
        return config["model"]["path"], config["data"]["path"], config["data"]["parser"]

    assert of("model=some/where") == ("some/where", None, "demonstrations")
    assert of("model=name-only") == ("name-only", None, "demonstrations")
    assert of("data=a/b.jsonl", "model=/an odd, path") == ("/an odd, path", "a/b.jsonl", "demonstrations")
    assert of("data=my data.jsonl") == ("m", "my data.jsonl", "demonstrations")
    assert of("data=preferences", "data.path=~/d.jsonl") == ("m", "/home/me/d.jsonl", "preferences")


def test_the_users_folder_comes_first(tmp_path: Path) -> None:
    (tmp_path / "algorithm").mkdir()
    (tmp_path / "algorithm/mine.yaml").write_text("_target_: my.Own\ngamma: 3\n")
    found = compose("train", ["algorithm=mine", "algorithm.gamma=4", "model=x"], tmp_path)
    assert found["algorithm"] == {"_target_": "my.Own", "gamma": 4}
    with pytest.raises(ConfigError, match=r"^algorithm\.gama: unknown key; did you mean 'gamma'\?$"):
        compose("train", ["algorithm=mine", "algorithm.gama=4"], tmp_path)
    with pytest.raises(ConfigError, match=r"^algorithm=mien: there is no such option; did you mean 'mine'\?$"):
        compose("train", ["algorithm=mien"], tmp_path)
    (tmp_path / "algorithm/broken.yaml").write_text("a: 1\nb: ]\n")
    with pytest.raises(ConfigError, match=r"algorithm/broken\.yaml:2: not YAML: "):
        compose("train", ["algorithm=broken"], tmp_path)


def test_a_file_of_callbacks_is_chosen_like_that_of_any_other_part(tmp_path: Path) -> None:
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "early.yaml").write_text("early:\n  _target_: mine.Early\n  at: 1\n")
    given = ["model=x", "callbacks=early", "callbacks.early.at=2", "callbacks.other._target_=mine.Other"]
    config = compose("train", given, own=tmp_path)
    assert config["callbacks"] == {"early": {"_target_": "mine.Early", "at": 2}, "other": {"_target_": "mine.Other"}}


class Tilted:
    def __init__(self, power: float = 1.0, lr: float = 1.0) -> None:
        self.power, self.lr = power, lr


class Anything:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["schedule._target_=X"], {}),  # without the default's `warmup`
        (["schedule._target_=X", "schedule.power=2"], {"power": 2}),  # a key that the default lacks
        (["optimizer._target_=X"], {"lr": 1e-5}),  # what it takes stays as the option says
        (["algorithm=dpo", "algorithm._target_=X", "algorithm.powr=3"], {"powr": 3}),  # refused where it is built
        (["order._target_=X"], {}),
        (["tracker=wandb", "tracker._target_=X", "tracker.power=1"], {"power": 1}),
    ],
)
def test_a_class_on_the_command_line_takes_the_place_of_the_default_s(words: list[str], left: dict[str, Any]) -> None:
    """Keys of the option that it replaces are dropped, unless it takes them too."""
    group = words[-1].partition(".")[0]
    found = resolve(compose("train", ["model=x", *(w.replace("=X", f"={HERE}.Tilted") for w in words)]))[group]
    assert found == {"_target_": f"{HERE}.Tilted", **left}
    several = [w.replace("=X", f"={HERE}.Anything") for w in words]
    assert {*left} <= {*resolve(compose("train", ["model=x", *several]))[group]}, "it takes whatever there is"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["scoring=[labels,function]", "scoring.function.path=a.b"],
            "scoring.function.path: unknown key; did you mean 'scoring.function.function.path'?",
        ),
        (["scoring=[labels,function]", "scoring.function.colum=a"], "unknown key; did you mean 'column'?"),
        (
            ["rollout=canned", "rollout.max_new_tokens=8"],
            "rollout.max_new_tokens: unknown key of rollout=canned; known here: _target_, text; rollout=",
        ),
        (
            ["algorithm=nan"],
            "algorithm=nan: nan is read as a float, not as a name: rename algorithm/nan.yaml",
        ),
        (["rollout.max_new_tokns=8"], "rollout.max_new_tokns: unknown key; did you mean 'max_new_tokens'?"),
        (["scoring.pth=8"], "scoring.pth: unknown key"),
    ],
)
def test_what_is_said_of_unknown_keys(tmp_path: Path, words: list[str], said: str) -> None:
    for group, name in (("rollout", "canned"), ("algorithm", "nan")):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text("_target_: my.Own\ntext: hi\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose("train", ["model=x", *words], tmp_path)


def test_composing_within_a_sweep(tmp_path: Path) -> None:
    """Hydra refuses to be started twice; a sweep over comparisons composes the configs of their runs."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("train", ["model=x"])["model"]["path"] == "x"
        assert GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("source.prompts", "source.rollout_batch_size"),
        ("source.samples", "source.group_size"),
        ("training.token_budget", "training.max_tokens_per_microbatch"),
    ],
)
def test_a_renamed_key_answers_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose("train", [f"{old}=3"])
    assert str(raised.value) == f"{old}: unknown key: it is called {new}"
