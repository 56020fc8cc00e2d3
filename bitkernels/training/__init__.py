"""Training, distillation and evaluation."""

from bitkernels.training.bigram import BigramModel
from bitkernels.training.checkpoints import Checkpoints
from bitkernels.training.evaluate import perplexity
from bitkernels.training.loop import Step, TrainConfig, plan_steps, train
from bitkernels.training.losses import training_loss

__all__ = [
    "BigramModel",
    "Checkpoints",
    "Step",
    "TrainConfig",
    "perplexity",
    "plan_steps",
    "train",
    "training_loss",
]
