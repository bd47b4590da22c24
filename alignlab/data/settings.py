"""The settings of the data layer: the section `data` of a config, explained line by line in configs/data/base.yaml."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from alignlab.core.errors import did_you_mean
from alignlab.core.settings import Settings
from alignlab.data.formats import FIELDS, FORMATS, find_parser

PLACES = ("prompt", "instruction", "input")
"""What a prompt template may hold, in braces."""


class DataSettings(Settings):
    """Where records come from and how they become groups of tokens. Lengths are in tokens."""

    path: str | list[str] | None = None
    split: str | None = None
    subset: str | None = None
    separator: str | None = None
    parser: str | dict[str, Any] | Callable = "auto"
    fields: dict[str, str] = Field(default_factory=dict)
    max_records: int | None = Field(None, ge=1)
    merge: bool = False
    on_bad_record: Literal["stop", "skip"] = "stop"

    validation: float | str = 0.0
    test: float | str = 0.0
    seed: int = Field(0, ge=0, lt=2**63)

    chat_template: str = "auto"
    loss_on: Literal["all_assistant", "last_assistant"] = "all_assistant"
    prompt_template: str = "{prompt}"
    response_separator: str = ""
    add_bos: bool | Literal["auto"] = "auto"
    append_eos: bool = True
    step_separator: str = "\n"
    step_token: str | None = Field(None, min_length=1)

    max_prompt_length: int | None = Field(None, ge=1)
    max_response_length: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=2)
    keep_prompt: Literal["end", "start"] = "end"
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    chunk: bool = True

    @property
    def paths(self) -> list[str]:
        """`path` as a list: the files are read one after the other."""
        if self.path is None:
            return []
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @field_validator("path")
    @classmethod
    def _not_empty(cls, path: str | list[str] | None) -> str | list[str] | None:
        """An empty path would be the current folder."""
        if path is not None and (not path or "" in ([path] if isinstance(path, str) else path)):
            raise ValueError("is empty: give a file, a folder or a dataset, as in data.path=my.jsonl")
        return path

    @field_validator("parser")
    @classmethod
    def _known_parser(cls, parser: Any) -> Any:
        if parser != "auto":
            find_parser(parser)
        return parser

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, fields: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        """A parser of the user's may read fields of any name."""
        for name in fields if info.data.get("parser") in ("auto", *FORMATS) else ():
            if name not in FIELDS:
                raise ValueError(
                    f"maps alignlab's name for a field to yours, but '{name}' is none of alignlab's"
                    f"{did_you_mean(name, FIELDS)}"
                )
        return fields

    @field_validator("validation", "test")
    @classmethod
    def _fraction(cls, share: float | str) -> float | str:
        if isinstance(share, float) and not 0 <= share < 1:
            raise ValueError(f"must be a fraction in [0, 1), the name of a split, or a path; got {share}")
        return share

    @field_validator("prompt_template")
    @classmethod
    def _has_place(cls, template: str) -> str:
        if template != "alpaca" and "{prompt}" not in template and "{instruction}" not in template:
            raise ValueError(f"must be 'alpaca' or a text with {{prompt}} or {{instruction}} in it; got {template!r}")
        for name in re.findall(r"\{(\w+)\}", template):
            if name not in PLACES:
                raise ValueError(
                    f"has a place {{{name}}} that nothing fills{did_you_mean(name, PLACES)}; a template in which "
                    "braces are text is a Jinja file: data.chat_template"
                )
        return template

    @model_validator(mode="after")
    def _something_to_train_on(self) -> DataSettings:
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError(f"validation={self.validation} and test={self.test} leave nothing to train on")
        return self
