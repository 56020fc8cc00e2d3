"""Generation of text."""

from bitkernels.inference.generate import generate, sample, stream

__all__ = ["generate", "sample", "stream"]
