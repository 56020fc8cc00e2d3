"""Generation of text: sampling, and an engine that serves many requests at once."""

from bitkernels.inference.engine import Engine, Request
from bitkernels.inference.memory import MemoryPlan, plan_memory
from bitkernels.inference.sampling import SamplingParams

__all__ = ["Engine", "MemoryPlan", "Request", "SamplingParams", "plan_memory"]
