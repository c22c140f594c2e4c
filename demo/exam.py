"""Training and test questions of the demo model: sums in several phrasings, and questions about the server.

`train` and `evaluate` share this module, so that training never contains a held-out sum.
"""

import json
import random
import re
from dataclasses import dataclass

LARGEST = 99
HELD_OUT_EVERY = 10
"""One in this many pairs of operands is excluded from training, in every phrasing."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful calculator.",
    "You answer questions about this server and do sums.",
)

AS_JSON = " Answer as JSON."

PLUS_PHRASINGS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "Add {a} and {b}.",
    "Please add {b} to {a}.",
    "Calculate {a}+{b}",
    "{a} + {b} = ?",
    "{a}+{b}",
)

MINUS_PHRASINGS = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "How much is {a} - {b}?",
    "Take {b} from {a}.",
    "Please subtract {b} from {a}.",
    "Calculate {a}-{b}",
    "{a} - {b} = ?",
    "{a}-{b}",
)

SMALL_TALK = (
    (
        ("Hello!", "Hi", "Hello", "Hey there", "Good morning"),
        "Hello! Ask me a sum, or about this server.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Which model are you?"),
        "I am the demo model of kserve-llm, a tiny language model.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?"),
        "I add and subtract numbers up to 99, and I answer a few questions about this server.",
    ),
    (
        ("Which protocols do you speak?", "How can I talk to this server?", "What API is this?"),
        "I speak the Open Inference Protocol v2 through KServe.",
    ),
    (
        ("Where do your weights come from?", "How were you downloaded?"),
        "The storage initializer put a verified snapshot on a volume, and the predictor loaded it.",
    ),
    (
        ("Are you large?", "How big are you?", "How many parameters do you have?"),
        "I am small: less than a million parameters.",
    ),
    (
        ("Do you scale to zero?", "What happens when nobody asks?"),
        "Yes. When nobody asks, Knative scales me to zero, and the next question wakes me.",
    ),
    (
        ("Thank you!", "Thanks", "Thanks a lot!"),
        "You are welcome.",
    ),
)


CITIES = (
    "Amsterdam", "Athens", "Berlin", "Bern", "Boston", "Cairo", "Delhi", "Dublin", "Lima", "Lisbon", "London", "Madrid",
    "Milan", "Oslo", "Paris", "Prague", "Rome", "Seoul", "Tokyo", "Vienna",
)  # fmt: skip
WEATHER_PHRASINGS = ("What is the weather in {city}?", "How is the weather in {city}?", "Weather in {city}?")
WEATHERS = ("sunny", "rain", "cloudy", "windy", "snow", "14 degrees", "21 C", "3 degrees and rain")


@dataclass(frozen=True, slots=True)
class Sum:
    """One addition or subtraction: operands in 0..99, `operator` either "+" or "-"."""

    a: int
    operator: str
    b: int

    @property
    def result(self) -> int:
        """The correct result, -99 to 198."""
        return self.a + self.b if self.operator == "+" else self.a - self.b

    @property
    def held_out(self) -> bool:
        """Whether training excludes these operands; a fixed pattern without structure in the digits."""
        return (self.a * 7919 + self.b * 104729 + ord(self.operator)) % 1009 % HELD_OUT_EVERY == 0

    @property
    def working(self) -> str:
        """The trained answer: digit by digit, the result last.

        >>> Sum(17, "+", 25).working
        '7+5=12 1+2+1=4 42'
        >>> Sum(42, "-", 17).working
        '12-7=5 3-1=2 25'
        >>> Sum(17, "-", 42).working
        '42-17 12-7=5 3-1=2 -25'
        """
        if self.operator == "+":
            ones = self.a % 10 + self.b % 10
            carry = ones // 10
            tens = self.a // 10 + self.b // 10 + carry
            carried = "+1" if carry else ""
            return f"{self.a % 10}+{self.b % 10}={ones} {self.a // 10}+{self.b // 10}{carried}={tens} {self.result}"
        if self.a < self.b:
            swapped = Sum(self.b, "-", self.a)
            steps, _, _ = swapped.working.rpartition(" ")
            return f"{self.b}-{self.a} {steps} {self.result}"
        borrow = self.a % 10 < self.b % 10
        ones = self.a % 10 + 10 * borrow
        tens = self.a // 10 - borrow
        return f"{ones}-{self.b % 10}={ones - self.b % 10} {tens}-{self.b // 10}={tens - self.b // 10} {self.result}"

    @property
    def json_answer(self) -> str:
        """The trained answer to a question that ends with `AS_JSON`.

        >>> Sum(17, "+", 25).json_answer
        '{"working": "7+5=12 1+2+1=4", "result": 42}'
        """
        return json.dumps({"working": self.working.rpartition(" ")[0], "result": self.result})

    def phrase(self, rng: random.Random) -> str:
        """Return the question in a random phrasing."""
        phrasings = PLUS_PHRASINGS if self.operator == "+" else MINUS_PHRASINGS
        return rng.choice(phrasings).format(a=self.a, b=self.b)


def random_sum(rng: random.Random, *, held_out: bool) -> Sum:
    """Draw a sum uniformly from the held-out ones, or from the others."""
    while True:
        drawn = Sum(rng.randint(0, LARGEST), rng.choice("+-"), rng.randint(0, LARGEST))
        if drawn.held_out == held_out:
            return drawn


def held_out_questions(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Return `count` held-out questions, each with its result."""
    rng = random.Random(seed)
    sums = [random_sum(rng, held_out=True) for _ in range(count)]
    return [(drawn.phrase(rng), drawn.result) for drawn in sums]


def final_number(answer: str) -> int | None:
    """Return the number at the end of an answer, or None."""
    match = re.search(r"(?:^|\s)(-?\d+)\s*$", answer)
    return int(match.group(1)) if match else None
