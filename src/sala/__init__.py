"""Sparse-linear hybrids of pretrained Transformers: convert, train, run. Importing registers the model with transformers."""

from sala.errors import loading

with loading():
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, MiniCPMSALAModel, SalaCache
    from sala.model.families import load_model

__version__ = "0.1.0"
__all__ = ["MiniCPMSALAConfig", "MiniCPMSALAForCausalLM", "MiniCPMSALAModel", "SalaCache", "load_model"]

AutoConfig.register("minicpm_sala", MiniCPMSALAConfig)
AutoModel.register(MiniCPMSALAConfig, MiniCPMSALAModel)
AutoModelForCausalLM.register(MiniCPMSALAConfig, MiniCPMSALAForCausalLM)
