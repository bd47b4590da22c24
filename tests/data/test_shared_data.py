"""Real data sets and a real tokenizer, with its quirks."""

import gzip
import json

import pytest

from alignlab.core import DataError
from alignlab.data import DataSettings, encode_prompt, load


def rows_of(path):
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_hh_rlhf_with_its_bad_pairs(shared, real_tokenizer):
    folder = shared / "data" / "hh-rlhf"
    bad = set()
    for path in sorted(folder.glob("*.jsonl.gz")):
        for line, row in enumerate(rows_of(path), 1):
            (context, _, answer), (other, _, worse) = (
                row[key].rpartition("\n\nAssistant:") for key in ("chosen", "rejected")
            )
            turns = [
                turn
                for text in row.values()
                for turn in text.replace("\n\nAssistant:", "\n\nHuman:").split("\n\nHuman:")[1:]
            ]
            ends = "\n\nHuman:" in answer + worse
            if context != other or answer.strip() == worse.strip() or ends or not all(turn.strip() for turn in turns):
                bad.add(f"{path.name}:{line}")
    splits = load(DataSettings(path=str(folder), on_bad_record="skip", validation=0.1), real_tokenizer)
    report = splits.report
    assert report.read == 2354 + 1137  # the README of ../shared
    assert report.bad == len(bad) > 0
    used = {group.origin.rpartition("/")[2] for group in splits.train + splits.validation}
    assert len(used) == report.read - len(bad) and not used & bad
    first = min(bad, key=lambda origin: (origin.split(":")[0], int(origin.split(":")[1])))
    with pytest.raises(DataError, match=first):
        load(DataSettings(path=str(folder)), real_tokenizer)
    assert not {g.prompt for g in splits.train} & {g.prompt for g in splits.validation}
    for group in splits.train[:200]:
        assert [r.columns for r in group.responses] == [{"score": 1.0}, {"score": 0.0}]
        assert all(r.token_ids[-1] == real_tokenizer.eos_token_id for r in group.responses)
        assert group.prompt.endswith("\n\nAssistant:")


def test_hh_rlhf_as_conversations(shared, tokenizer):
    """What bears loss, decoded, is what stands behind each "Assistant:" of the file."""
    path = shared / "data" / "hh-rlhf" / "helpful-online_test.jsonl.gz"
    settings = DataSettings(path=str(path), parser="chat", fields={"messages": "chosen"}, on_bad_record="skip")
    groups = load(settings, tokenizer).train[:100]
    rows = rows_of(path)
    for group in groups:
        row = rows[int(group.origin.rpartition(":")[2]) - 1]
        turns = [turn.split("\n\nHuman:")[0].strip() for turn in row["chosen"].split("\n\nAssistant:")[1:]]
        (response,) = group.responses
        said = tokenizer.decode([response.token_ids[i] for i in response.predicted])
        assert [turn.strip() for turn in said.split("</s>")[:-1]] == turns
    assert any(group.responses[0].loss_mask for group in groups)


def test_rasbt_instructions(shared, tokenizer):
    path = shared / "data" / "rasbt" / "instruction-data.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    splits = load(DataSettings(path=str(path), prompt_template="alpaca"), tokenizer)
    assert len(splits.train) == len(rows) == 1100
    for row, group in zip(rows, splits.train, strict=True):
        assert tokenizer.decode(group.responses[0].token_ids) == row["output"] + "</s>"
        assert (f"### Input:\n{row['input']}\n\n" in group.prompt) == bool(row["input"])
    assert splits.train[5].origin == f"{path}:5"


def test_rasbt_preferences(shared, tokenizer):
    path = shared / "data" / "rasbt" / "instruction-data-with-preference.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    good = [row for row in rows if row["chosen"] != row["rejected"]]
    splits = load(DataSettings(path=str(path), on_bad_record="skip"), tokenizer)
    assert [[r.text for r in g.responses] for g in splits.train] == [[row["chosen"], row["rejected"]] for row in good]
    assert splits.report.bad == len(rows) - len(good) > 0
    assert [group.extra["output"] for group in splits.train] == [row["output"] for row in good]


def test_gsm8k_as_demonstrations_and_as_prompts(shared, tokenizer):
    folder = shared / "data" / "gsm8k"
    splits = load(DataSettings(path=str(folder), test="test", max_length=1000), tokenizer)
    assert (len(splits.train), len(splits.test)) == (7473, 1319)
    for row, group in zip(rows_of(folder / "test.jsonl"), splits.test, strict=True):
        assert group.prompt == row["question"]
        if group.responses[0].finished:
            assert group.responses[0].text == row["answer"]
    long = sum(len((r["question"] + r["answer"]).encode()) + 1 > 1000 for r in rows_of(folder / "train.jsonl"))
    assert sum(not group.responses[0].finished for group in splits.train) <= long
    prompts = load(DataSettings(path=str(folder / "test.jsonl"), parser="prompts"), tokenizer).train
    assert [group.extra["answer"] for group in prompts] == [row["answer"] for row in rows_of(folder / "test.jsonl")]
    assert not any(group.responses for group in prompts)


def test_stories_are_tokenised_as_the_model_learned_them(shared, real_tokenizer):
    """The model card: a story begins with <|start_story|>, tokenised without further special tokens."""
    path = shared / "data" / "tinystories" / "train.jsonl"
    texts = [row["text"] for row in rows_of(path)[:300]]
    splits = load(DataSettings(path=str(path), max_records=300, max_length=128), real_tokenizer)
    whole: dict[str, list[int]] = {}
    for group in splits.train:
        assert group.prompt_ids == [real_tokenizer.bos_token_id]
        whole.setdefault(group.origin, []).extend(group.responses[0].token_ids)
    expected = real_tokenizer([f"<|start_story|>{text}<|end_story|>" for text in texts], add_special_tokens=False)
    assert [[real_tokenizer.bos_token_id, *ids] for ids in whole.values()] == expected["input_ids"]


def test_a_response_is_tokenised_as_a_continuation(stories_tokenizer, tmp_path):
    """SentencePiece tokenizers put a space before a text. A response stands behind a prompt: it gets none."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Once upon a time ", "completion": "there was a cat."}))
    settings = DataSettings(path=str(path), prompt_template="<|start_story|>{prompt}")
    (group,) = load(settings, stories_tokenizer).train
    together = stories_tokenizer(
        "<|start_story|>Once upon a time there was a cat.<|end_story|>", add_special_tokens=False
    )
    assert group.prompt_ids + group.responses[0].token_ids == together["input_ids"]
    assert encode_prompt("Once upon a time ", stories_tokenizer, settings) == group.prompt_ids
