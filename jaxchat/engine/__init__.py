"""Token ids in, token ids out: prefill, decode, sampling, sessions and batches. Knows no tokenizer."""
