"""Write the questions of the tasks in `lm_eval`, for lm-evaluation-harness: `python -m demo.lm_eval_questions`."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from demo import exam
from demo.exam import Sum

DEMO = Path(__file__).parent
QUESTIONS = DEMO / "lm_eval" / "sums.jsonl"
"""The tasks have this path relative to the root of the repository."""
COUNT = 100


def questions(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield held-out sums: the model's prompt, four answers, the index of the correct one, and the result."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model", local_files_only=True)
    rng = random.Random(seed)
    for _ in range(COUNT):
        drawn = exam.random_sum(rng, held_out=True)
        messages = [{"role": "user", "content": drawn.phrase(rng)}]
        answers = _answers(drawn, rng)
        yield {
            "prompt": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            "answers": answers,
            "correct": answers.index(drawn.working),
            "result": str(drawn.result),
        }


def _answers(drawn: Sum, rng: random.Random) -> list[str]:
    """Return the trained answer, and three with the same working and a wrong result, in random order."""
    steps, _, _ = drawn.working.rpartition(" ")
    answers = [f"{steps} {drawn.result + error}" for error in (0, *rng.sample([-10, -2, -1, 1, 2, 10], 3))]
    rng.shuffle(answers)
    return answers


def text() -> str:
    """Return the content of the file."""
    return "".join(json.dumps(question) + "\n" for question in questions())


if __name__ == "__main__":
    QUESTIONS.write_text(text())
