"""Making a checkpoint's weights 4 or 8 bits a number: GPTQ or rounding, layer by layer."""

from sala.quant.run import Result, Settings, quantize

__all__ = ["Result", "Settings", "quantize"]
