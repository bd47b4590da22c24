"""Records to groups: what is in people's files, as prompts and responses of tokens.

    file, folder, hub ── sources.read ──► Record     fields by name, and "file:line"
                      ── data.parser ───► Example    a prompt and its responses as text, and what is known of each
                      ── Encoder.render ─► Example   the same, with its texts in the templates
                      ── split, merge ──► Example    train, validation, test; answers to one prompt joined
                      ── Encoder.groups ─► Group     token ids, loss masks, columns, within the length limits
                      ── report ────────► DataReport what was read, cut, dropped, repeated, leaked

| file       | holds                                                                                |
|------------|--------------------------------------------------------------------------------------|
| sources    | files, folders, `datasets`                                                           |
| formats    | a parser for each kind of record; yours is named by `data.parser`                    |
| fields     | how a field of a record is checked: texts, numbers, conversations                    |
| chat       | conversations to text, through a chat template                                       |
| steps      | where the steps of a solution end                                                    |
| encode     | texts to tokens, and which of them bear loss                                         |
| lengths    | length limits                                                                        |
| splits     | `load`: the whole way; splits, leaks, duplicates, merging                            |
| report     | what happened to the records                                                         |
| groups     | files that are written: JSON lines, and groups with their tokens                     |
| settings   | the section `data` of a config                                                       |
"""

from alignlab.data.encode import encode_prompt
from alignlab.data.groups import group_to_record, write_jsonl
from alignlab.data.report import DataReport
from alignlab.data.settings import DataSettings
from alignlab.data.splits import Splits, load

__all__ = ["DataReport", "DataSettings", "Splits", "encode_prompt", "group_to_record", "load", "write_jsonl"]
