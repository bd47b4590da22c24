"""Loads what was saved with transformers and peft alone, as anyone would, and writes down what the models say.

Run by test_save.py in a process of its own: `python plain_reload.py requests.json answers.json`.
"""

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

AUTO = {
    "causal": AutoModelForCausalLM,
    "score": AutoModelForSequenceClassification,
    "step": AutoModelForTokenClassification,
}


def on_quantized_base(folder: str, base: str, kind: str, labels: int | None):
    """The adapter in `folder` on a base that is held as it was in training, by the `quantization.json` beside it.

    Evaluation mode is not for comparing on a CPU: there bitsandbytes computes 4-bit products in bfloat16 where the
    processor can, and rounds the inputs of 8-bit ones. In training mode, here without dropout, it does neither.
    """
    config = BitsAndBytesConfig.from_dict(json.loads((Path(folder) / "quantization.json").read_text()))
    options = {} if kind == "causal" else {"num_labels": labels}
    model = AUTO[kind].from_pretrained(base, quantization_config=config, dtype=torch.float32, **options)
    model = PeftModel.from_pretrained(model, folder).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    return model


def log_probs(model, sequences: list[list[int]], starts: list[int]) -> list[float]:
    """Of the tokens from `start` on, each sequence by itself."""
    found = []
    for ids, start in zip(sequences, starts, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        found += logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None])[:, 0].tolist()
    return found


def scores(model, tokenizer, sequences: list[list[int]]) -> list[list[float]]:
    """One by one, and as batches padded on the right and on the left."""
    model.config.pad_token_id = tokenizer.pad_token_id
    found = [[float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]]
    for tokenizer.padding_side in ("right", "left"):
        batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        found.append(model(**batch).logits[:, 0].tolist())
    return found


@torch.no_grad()
def answer(request: dict) -> dict:
    folder, base, loader = request["folder"], request.get("base"), request["loader"]
    quantized = loader.endswith("on quantised base")
    if quantized:
        model = on_quantized_base(folder, base, loader.split()[0], request.get("labels"))
    elif loader == "causal":
        model = AutoModelForCausalLM.from_pretrained(folder)
    elif loader == "causal on base":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), folder)
    elif loader == "causal, auto":
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32")
    elif loader == "score":
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    elif loader == "score on base":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")
        model = PeftModel.from_pretrained(model, folder)
    elif loader == "score, auto":
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype="float32")
    elif loader == "step":
        model = AutoModelForTokenClassification.from_pretrained(folder)
    elif loader == "step on base":
        model = PeftModel.from_pretrained(AutoModelForTokenClassification.from_pretrained(base, num_labels=3), folder)
    else:
        raise ValueError(loader)
    if not quantized:
        model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences = request["sequences"]
    if loader.startswith("causal"):
        values = log_probs(model, sequences, request["starts"])
    elif loader.startswith("score"):
        values = scores(model, tokenizer, sequences)
    else:
        values = [model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in sequences]
    parameters = sum(p.numel() for p in model.parameters())
    return {"values": values, "class": type(model).__name__, "parameters": parameters, "text": tokenizer.decode([5, 6])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        asked = json.load(file)
    answers = {name: answer(request) for name, request in asked.items()}
    assert not any(name.split(".")[0] == "alignlab" for name in sys.modules)
    with open(sys.argv[2], "w") as file:
        json.dump(answers, file)
