"""Small models for these tests: real architectures with random weights, and a scripted one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor, nn

from alignlab.core import Group
from alignlab.models import PackedModel

PIECES = ["<pad>", "<eos>", "<end>", "a", "b", "c", "ab", "ca", " ", "\n", "d", "e", "f", "g", "h", "i", "j", "k", "l"]
PAD, EOS, END = 0, 1, 2
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def ids(text: str) -> list[int]:
    """Token ids of pieces parted by `|`."""
    return [PIECES.index(piece) for piece in text.split("|")]


def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def config(name: str, vocabulary: int = len(PIECES)) -> Any:
    import transformers as t

    common = {
        "vocab_size": vocabulary,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": PAD,
        "tie_word_embeddings": False,
    }
    two = {**SIZES, "num_key_value_heads": 2}
    if name == "llama":
        return t.LlamaConfig(**common, **two)
    if name == "gpt2":
        return t.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    if name == "gpt_neox":
        return t.GPTNeoXConfig(**common, **SIZES)
    if name == "mistral":
        return t.MistralConfig(**common, **two, sliding_window=5)
    if name == "qwen2":
        return t.Qwen2Config(**common, **two)
    if name == "mistral, wide":
        return t.MistralConfig(**common, **two, sliding_window=40)
    if name == "qwen3":
        return t.Qwen3Config(**common, **two, head_dim=16)
    if name == "phi":
        return t.PhiConfig(**common, **two)
    if name == "gemma":
        return t.GemmaConfig(**common, **two, head_dim=8)
    if name == "gemma2":
        return t.Gemma2Config(**common, **two, head_dim=8, sliding_window=5)
    if name == "bloom":
        return t.BloomConfig(**common, hidden_size=32, n_layer=2, n_head=4)
    if name == "mamba":
        return t.MambaConfig(**common, hidden_size=32, num_hidden_layers=2, state_size=4)
    if name == "openai-gpt":
        return t.OpenAIGPTConfig(**common, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert name == "recurrent_gemma"
    sizes = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    blocks = ("recurrent", "attention")
    return t.RecurrentGemmaConfig(**common, **sizes, lru_width=32, attention_window_size=16, block_types=blocks)


def network(name: str, spread: float = 0.3, seed: int = 0, **changes: Any) -> Any:
    """A random network whose weights are large enough that context matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = config(name, changes.pop("vocab_size", len(PIECES)))
    for key, value in changes.items():
        setattr(settings, key, value)
    made = AutoModelForCausalLM.from_config(settings)
    for parameter in made.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=spread)
    return made


def model(name: str = "llama", **changes: Any) -> PackedModel:
    return PackedModel(network(name, **changes), tokenizer())


def prompts(*lengths: int, seed: int = 0) -> list[Group]:
    """Groups with random prompts of these lengths, each from a line of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Group(torch.randint(3, len(PIECES), (length,), generator=generator).tolist(), origin=f"prompts.jsonl:{i + 1}")
        for i, length in enumerate(lengths)
    ]


def plain_logits(net: Any, tokens: list[int]) -> Tensor:
    """Logits (L, V) of one sequence by the network's own forward, without cache, padding or gradient."""
    training = net.training
    net.eval()
    with torch.no_grad():
        logits = net(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    net.train(training)
    return logits


def plain_logp(net: Any, prompt: list[int], response: list[int]) -> list[float]:
    logp = plain_logits(net, prompt + response)[len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(-1, torch.tensor(response)[:, None]).squeeze(-1).tolist()


class Scripted(nn.Module):
    """A network without cache that wants certain tokens after each token: the first most, the last least."""

    def __init__(self, wishes: dict[str, str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.dtype = torch.float32
        settings = SimpleNamespace(vocab_size=len(PIECES), pad_token_id=PAD, max_position_embeddings=64)
        settings.get_text_config = lambda: settings
        self.config = settings
        self.generation_config = SimpleNamespace(eos_token_id=EOS)
        self.table = torch.full((len(PIECES), len(PIECES)), -9.0)
        for last, wanted in wishes.items():
            for rank, token in enumerate(ids(wanted)):
                self.table[PIECES.index(last), token] = -float(rank)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])
