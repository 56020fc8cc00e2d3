"""Training, distillation and evaluation."""

from bitkernels.training.bigram import BigramModel
from bitkernels.training.evaluate import perplexity
from bitkernels.training.loop import TrainConfig, plan_steps, train
from bitkernels.training.losses import distillation_loss

__all__ = ["BigramModel", "TrainConfig", "distillation_loss", "perplexity", "plan_steps", "train"]
