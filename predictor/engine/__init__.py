"""Token ids in, token ids out: continuous batching, sampling and the KV cache."""
