import numpy as np

from benchmarks.speculation import Replay, Vocabulary, texts


def test_texts_have_half_of_their_ngrams_from_their_prompts() -> None:
    for prompt, answer in texts().values():
        vocabulary = Vocabulary()
        before, after = vocabulary.encode(prompt), vocabulary.encode(answer)
        known = {tuple(before[end - 3 : end]) for end in range(3, len(before))}
        repeated = [tuple(after[end - 3 : end]) in known for end in range(3, len(after))]
        assert len(after) > 60
        assert sum(repeated) > len(repeated) / 2


def test_replay_allows_only_the_next_token() -> None:
    replay = Replay([9, 17], 20)
    assert np.flatnonzero(np.unpackbits(replay([1, 2], []), bitorder="little")).tolist() == [9]
    assert np.flatnonzero(np.unpackbits(replay([1, 2], [9]), bitorder="little")).tolist() == [17]
