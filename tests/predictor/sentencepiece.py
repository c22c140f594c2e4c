"""Small tokenizers like those that are converted from SentencePiece: a space is the beginning of a token."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|assistant|>")
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
WORDS = ("▁Once", "▁upon", "▁a", "▁time", "Once", "def", "▁return", ":", "é", "日", "▁", "▁▁", "▁▁▁▁", *"abcdefgh")


def llama(words: Sequence[str] = WORDS, *, byte_fallback: bool = True) -> PreTrainedTokenizerBase:
    """As Llama 2 and Mistral: the normalizer prepends a space, the decoder strips one."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _tokenizer((*(BYTES if byte_fallback else ()), *words), normalizer, None, decoders.Sequence(decoder))


def metaspace() -> PreTrainedTokenizerBase:
    """As T5: the pre-tokenizer prepends a space to the first word, the decoder strips it."""
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _tokenizer((*BYTES, *WORDS), None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), decoder)


def _tokenizer(
    tokens: Sequence[str],
    normalizer: normalizers.Normalizer | None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
    decoder: decoders.Decoder,
) -> PreTrainedTokenizerBase:
    pieces = [(piece, -float(index)) for index, piece in enumerate((*SPECIAL, *tokens))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=BYTES[0] in tokens))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=[SPECIAL[3]], **names)
