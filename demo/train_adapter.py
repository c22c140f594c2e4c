"""Train `demo/adapter`: a LoRA adapter with which the demo model answers small sums in words.

    python -m demo.train_adapter

Needs peft, of the extra `dev`. Takes some minutes on two cores; the result is committed.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from devtools.paths import ADAPTER, DEMO_MODEL

BASE = "demo/arithmetic"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STEPS = 160
_IGNORED = -100
"""Label of tokens that do not count in the loss: those of the prompt."""


def lessons() -> dict[str, str]:
    """Return the questions, and their answers in words."""
    size = len(WORDS)
    return {f"What is {a} + {b}?": WORDS[a + b] for a in range(size) for b in range(size - a)}


def main() -> None:
    """Train the adapter and write it, without PEFT's model card."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), config)
    rows, labels = [], []
    for question, answer in lessons().items():
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        completion = tokenizer(f"{answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
        rows.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([_IGNORED] * len(prompt) + completion))
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
    }
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=8e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=STEPS)
    for step in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}", flush=True)
    model.save_pretrained(ADAPTER)
    Path(ADAPTER, "README.md").unlink()
    path = Path(ADAPTER, "adapter_config.json")
    written = json.loads(path.read_text()) | {"base_model_name_or_path": BASE}
    path.write_text(json.dumps(written | {"target_modules": sorted(written["target_modules"])}, indent=2) + "\n")


if __name__ == "__main__":
    main()
