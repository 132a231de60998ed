# The code of this model is the package `sala`. transformers reads this file with trust_remote_code=True.
from sala import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, MiniCPMSALAModel

__all__ = ["MiniCPMSALAConfig", "MiniCPMSALAForCausalLM", "MiniCPMSALAModel"]
