"""Records to groups: readers, formats, chat templates, splits, lengths, packing."""

from alignlab.data.encode import encode_prompt
from alignlab.data.report import DataReport
from alignlab.data.settings import DataSettings
from alignlab.data.splits import Splits, load
from alignlab.data.writers import write_jsonl

__all__ = ["DataReport", "DataSettings", "Splits", "encode_prompt", "load", "write_jsonl"]
