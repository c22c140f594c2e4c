"""Fine-tune all weights of a small model on chats, and save it as a folder: `finetune.py BASE CHATS OUTPUT`."""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

IGNORED = -100
"""The label of tokens that the loss leaves out."""


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Return token ids and labels of a chat; only its last message, the answer, has labels."""
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def main() -> None:
    """Train on every chat in each epoch, and save model and tokenizer."""
    parser = argparse.ArgumentParser(description="Fine-tune a small model on chats.")
    parser.add_argument("base", help="folder of the model, or its name on the Hub")
    parser.add_argument("chats", type=Path, help="file with one JSON object per line, which has `messages`")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    chats = [encode(tokenizer, json.loads(line)["messages"]) for line in arguments.chats.read_text().splitlines()]
    longest = max(len(ids) for ids, _ in chats)
    # The padding's ids do not matter: a token sees only those before it, and the padding has no labels.
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chats])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in chats])
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    for epoch in range(arguments.epochs):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if epoch % 20 == 0 or epoch == arguments.epochs - 1:
            print(f"epoch {epoch}: loss {loss.item():.3f}")
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


main()
