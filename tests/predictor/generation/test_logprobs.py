from transformers import PreTrainedTokenizerBase

from predictor.generation.logprobs import LogprobsFormatter
from predictor.types import TokenLogprob


def test_format_returns_text_and_special_flag_of_all_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    [seven] = tokenizer.encode("7", add_special_tokens=False)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    token = LogprobsFormatter(tokenizer).format(TokenLogprob(end, -0.5, ((end, -0.5), (seven, -1.0))))
    assert (token.text, token.special, token.logprob) == ("<|end|>", True, -0.5)
    assert [(other.text, other.special) for other in token.top] == [("<|end|>", True), ("7", False)]
