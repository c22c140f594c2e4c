"""Train the demo model: tokenizer and a Llama of 0.9 M parameters. `python -m demo.train`.

The text comes from `demo.exam` and `demo.tool_lessons`, the tokenizer is trained on that text, and the weights start
from a fixed seed. Training takes about half an hour. The result is committed in `demo/model`, with the chat template.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo import exam, tool_lessons
from devtools.paths import DEMO_MODEL

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY_SIZE = 512
CONTEXT_TOKENS = 1024
BATCH_ROWS = 48
IGNORED = -100
"""The label that torch's cross entropy ignores."""

CHAT_TEMPLATE = (DEMO_MODEL / "chat_template.jinja").read_text()

Turns = list[tuple[str, str]]


def conversation(rng: random.Random) -> Turns:
    """Return a chat of up to five questions as (role, content) turns; half start with a system prompt."""
    turns: Turns = [("system", rng.choice(exam.SYSTEM_PROMPTS))] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.12:
            questions, answer = rng.choice(exam.SMALL_TALK)
            turns += [("user", rng.choice(questions)), ("assistant", answer)]
        else:
            drawn = exam.random_sum(rng, held_out=False)
            turns += [("user", drawn.phrase(rng)), ("assistant", drawn.working)]
    if rng.random() < 0.15:
        drawn = exam.random_sum(rng, held_out=False)
        turns += [("user", drawn.phrase(rng) + exam.AS_JSON), ("assistant", drawn.json_answer)]
    return turns


def _tool_text(rng: random.Random) -> Iterator[str]:
    messages, tools = tool_lessons.conversation(rng)
    yield from map(json.dumps, tools)
    for message in messages:
        yield message["content"]
        for call in message.get("tool_calls", ()):
            yield f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>"


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with one token per digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = (content for _ in range(3000) for _, content in conversation(rng))
    tools = (line for _ in range(600) for line in _tool_text(rng))
    tokenizer.train_from_iterator(
        chain(text, tools),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE,
            special_tokens=[PAD, BOS, EOS, *ROLES],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def lesson(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[list[int], list[int]]:
    """Return token ids and labels of one conversation, with or without tools, or raw sum; only answers have labels."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    if rng.random() < 0.15:
        drawn = exam.random_sum(rng, held_out=False)
        spelled = rng.choice(("{a}+{b}=", "{a} + {b} =")).replace("+", drawn.operator)
        prompt = encode(BOS + spelled.format(a=drawn.a, b=drawn.b))
        answer = encode(f" {drawn.working}{EOS}")
        return prompt + answer, [IGNORED] * len(prompt) + answer
    if rng.random() < 0.4:
        messages, tools = tool_lessons.conversation(rng)
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        ids, labels = list[int](), list[int]()
        # Every second part is an answer, from after the role to its end.
        for index, part in enumerate(re.split(r"(?<=<\|assistant\|>)(.*?<\|end\|>)", text, flags=re.DOTALL)):
            piece = encode(part)
            ids += piece
            labels += piece if index % 2 else [IGNORED] * len(piece)
        return ids, labels
    ids, labels = encode(BOS), [IGNORED]
    for role, content in conversation(rng):
        opening, rest = encode(f"<|{role}|>"), encode(content + EOS)
        ids += opening + rest
        labels += [IGNORED] * len(opening) + (rest if role == "assistant" else [IGNORED] * len(rest))
    return ids, labels


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and labels without end, each (`BATCH_ROWS`, longest lesson), padded on the right.

    Lessons of similar length share a batch, which saves half of the padding's computation.
    """
    while True:
        lessons = sorted((lesson(tokenizer, rng) for _ in range(BATCH_ROWS * 10)), key=lambda drawn: len(drawn[0]))
        groups = [lessons[start : start + BATCH_ROWS] for start in range(0, len(lessons), BATCH_ROWS)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in group]),
            )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model: 0.9 M parameters, grouped-query attention, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, steps: int) -> None:
    """Train with AdamW, warm-up and cosine decay for `steps` updates; print the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.06)
    started = time.monotonic()
    model.train()
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, rng), steps), start=1):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def main() -> None:
    """Train the model and save it with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEMO_MODEL)
    parser.add_argument("--steps", type=int, default=2400, help="number of updates (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(rng)
    model = make_model(tokenizer)
    print(f"{sum(weights.numel() for weights in model.parameters()):,} parameters", flush=True)
    train(model, tokenizer, rng, arguments.steps)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"saved to {arguments.output}", flush=True)


if __name__ == "__main__":
    main()
