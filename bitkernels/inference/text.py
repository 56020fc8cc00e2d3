"""Text in, text out."""

from collections.abc import Iterator

import torch
from tokenizers.decoders import DecodeStream

from bitkernels.checkpoint import Checkpoint
from bitkernels.inference.generate import stream


def stream_text(checkpoint: Checkpoint, prompt: str, max_new_tokens: int, **options) -> Iterator[str]:
    """Yields the prompt and then what the model adds to it, as whole characters; ``options`` as in ``stream``."""
    if checkpoint.tokenizer is None:
        raise ValueError("stream_text: the checkpoint holds no tokenizer")
    ids = checkpoint.tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("stream_text: prompt must not be empty")
    yield prompt
    decoder = DecodeStream(skip_special_tokens=False)
    tokens = torch.tensor([ids], device=checkpoint.model.device)
    for token in stream(checkpoint.model, tokens, max_new_tokens, **options):
        # A character of several bytes comes with its last byte.
        if piece := decoder.step(checkpoint.tokenizer, int(token)):
            yield piece
