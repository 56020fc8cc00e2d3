"""Models made of the package's layers and operators."""

from bitkernels.models.bimamba import BiMambaCache, BiMambaForCausalLM
from bitkernels.models.config import CONFIGS, BiMambaConfig

__all__ = ["CONFIGS", "BiMambaCache", "BiMambaConfig", "BiMambaForCausalLM"]
