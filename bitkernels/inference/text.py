"""Text in, text out."""

from collections.abc import Iterator

from tokenizers.decoders import DecodeStream

from bitkernels.checkpoint import Checkpoint


def stream_text(checkpoint: Checkpoint, prompt: str, **options) -> Iterator[str]:
    """Yields the prompt and then what the model adds to it, as whole characters; ``options`` as of ``generate``."""
    if checkpoint.tokenizer is None:
        raise ValueError("stream_text: the checkpoint holds no tokenizer")
    ids = checkpoint.tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("stream_text: prompt must not be empty")
    yield prompt
    decoder = DecodeStream(skip_special_tokens=False)
    for _, token in checkpoint.model.stream([ids], **options):
        # A character of several bytes comes with its last byte.
        if piece := decoder.step(checkpoint.tokenizer, token):
            yield piece
