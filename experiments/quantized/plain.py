"""What saved adapters say to anyone who has transformers, peft and bitsandbytes, and not this project.

Run by qlora.py in a process of its own: `python plain.py requests.json answers.json`. An adapter's folder says what its
base was held in (`quantization.json`); everything else is the base's own folder.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
)

AUTO = {
    "policy": AutoModelForCausalLM,
    "score": AutoModelForSequenceClassification,
    "step": AutoModelForTokenClassification,
}


def load(folder: Path, base: str, kind: str, labels: int):
    quantization = BitsAndBytesConfig.from_dict(json.loads((folder / "quantization.json").read_text()))
    options = {} if kind == "policy" else {"num_labels": labels}
    model = AUTO[kind].from_pretrained(base, quantization_config=quantization, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(model, str(folder))


def says(model, folder: Path, kind: str, sequences: list[list[int]], starts: list[int]) -> list[float]:
    """Log-probs of what follows the prompt (and the critic's values, where there is a critic), scores at the end, or
    logits of what follows the prompt; each text by itself."""
    found: list[torch.Tensor] = []
    for ids, start in zip(sequences, starts, strict=True):
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=kind == "policy")
        if kind == "policy":
            logp = out.logits[0, start - 1 : -1].log_softmax(-1)
            found.append(logp.gather(-1, torch.tensor(ids[start:])[:, None]).flatten())
        else:
            found.append(out.logits[0].flatten() if kind == "score" else out.logits[0, start:].flatten())
        if (folder / "value_head.safetensors").exists():
            head = load_file(folder / "value_head.safetensors")
            found.append(out.hidden_states[-1][0, start - 1 : -1] @ head["weight"][0] + head["bias"])
    return torch.cat(found).tolist()


@torch.no_grad()
def answer(folder: str, base: str, kind: str, labels: int, sequences: list[list[int]], starts: list[int]) -> dict:
    model = load(Path(folder), base, kind, labels)
    model.train()  # the products of training, which evaluation on a CPU approximates; without dropout
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    exact = says(model, Path(folder), kind, sequences, starts)
    return {"training": exact, "evaluation": says(model.eval(), Path(folder), kind, sequences, starts)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    requests = json.loads(Path(sys.argv[1]).read_text())
    answers = {name: answer(**request) for name, request in requests.items()}
    assert not any(name.split(".")[0] == "alignlab" for name in sys.modules)
    Path(sys.argv[2]).write_text(json.dumps(answers))
