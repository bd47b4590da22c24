"""Tokenizers of one token per byte, whose ids a test can write down by hand."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from alignlab.data import DataSettings, load
from tests import tiny

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _byte_alphabet() -> list[str]:
    """The characters that stand for bytes 0..255 in byte-level BPE (Radford et al. 2019), in the order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]


def byte_tokenizer(
    adds_bos: bool = False, bos: str | None = "<s>", eos: str | None = "</s>", template: str | None = None
):
    """Token id = byte value; 256… are the special tokens."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """One token per byte, no BOS of its own accord, no chat template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    """The same, with BOS put at the head of every text."""
    return byte_tokenizer(adds_bos=True)


@pytest.fixture(scope="session")
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture(scope="session")
def real_tokenizer(stories):
    """Of the SentencePiece kind. It puts a space before a text, and its tokens may be several words long."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="session", params=["made here", pytest.param("real", marks=pytest.mark.real_data)])
def stories_tokenizer(request):
    """The real one, and one made in its likeness."""
    return tiny.stories_tokenizer() if request.param == "made here" else request.getfixturevalue("real_tokenizer")


@pytest.fixture
def loaded(tmp_path):
    """Load records, given as dicts, with settings given as keywords."""

    def load_records(records, tokenizer, **settings):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load(DataSettings(path=str(path), **settings), tokenizer)

    return load_records
