"""Train the demo model: tokenizer, chat template, a Llama of 0.9 M parameters. `python -m demo.train`.

The text comes from `demo.exam`, the tokenizer is trained on that text, and the weights start from a fixed seed.
Training takes about ten minutes on two cores. The result is committed in `demo/model`.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo import exam

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY_SIZE = 512
CONTEXT_TOKENS = 1024
IGNORED = -100
"""The label that torch's cross entropy ignores."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('role must be system, user or assistant, not ' ~ message.role) }}"
    "{% endif %}"
    "{{ '<|' ~ message.role ~ '|>' ~ message.content ~ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

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
    return turns


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
    tokenizer.train_from_iterator(
        text,
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
    """Return token ids and labels of one conversation or raw sum; only answers have labels."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    if rng.random() < 0.15:
        drawn = exam.random_sum(rng, held_out=False)
        spelled = rng.choice(("{a}+{b}=", "{a} + {b} =")).replace("+", drawn.operator)
        prompt = encode(BOS + spelled.format(a=drawn.a, b=drawn.b))
        answer = encode(f" {drawn.working}{EOS}")
        return prompt + answer, [IGNORED] * len(prompt) + answer
    ids, labels = encode(BOS), [IGNORED]
    for role, content in conversation(rng):
        opening, rest = encode(f"<|{role}|>"), encode(content + EOS)
        ids += opening + rest
        labels += [IGNORED] * len(opening) + (rest if role == "assistant" else [IGNORED] * len(rest))
    return ids, labels


def batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, each (rows, longest lesson), padded on the right."""
    lessons = [lesson(tokenizer, rng) for _ in range(rows)]
    longest = max(len(ids) for ids, _ in lessons)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in lessons])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in lessons])
    return ids, labels


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
    for step in range(1, steps + 1):
        ids, labels = batch(tokenizer, rng, rows=48)
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
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=1400, help="number of updates (default: %(default)s)")
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
