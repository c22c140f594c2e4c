"""Random texts that follow a grammar, by the demo model's vocabulary."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from predictor.engine.grammar import Grammar

EOS = 2
MAX_TOKENS = 400
_LIKELY = 100.0


def random_text(
    grammar: Grammar, tokenizer: PreTrainedTokenizerBase, seed: int, *, begin: str = "", eos: int = EOS
) -> str | None:
    """Return a random text that follows the grammar; None if it has not ended after `MAX_TOKENS`.

    The text begins with `begin` where the grammar allows it. `eos` is the grammar's end-of-sequence token.
    """
    mask = grammar.token_mask()
    generator = torch.Generator().manual_seed(seed)
    likely = tokenizer.encode(begin, add_special_tokens=False)
    output: list[int] = []
    while len(output) < MAX_TOKENS:
        logits = torch.randn(max(512, len(tokenizer)), generator=generator)
        if len(output) < len(likely):
            logits[likely[len(output)]] += _LIKELY
        allowed = np.unpackbits(mask([], output), bitorder="little")[: len(logits)]
        token_id = int(logits.masked_fill(torch.from_numpy(allowed == 0), -torch.inf).argmax())
        if token_id == eos:
            return str(tokenizer.decode(output))
        output.append(token_id)
    return None
