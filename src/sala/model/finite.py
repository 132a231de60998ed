"""Models that compute numbers which are not finite: refused, with the tensor that they come from."""

import torch
from torch import Tensor, nn

from sala.errors import CheckpointError


def require_finite_weights(model: nn.Module, what: str) -> None:
    """Raise CheckpointError when a parameter holds NaN or infinity; `what`: the model, as its user calls it."""
    for name, parameter in model.named_parameters():
        # one pass without a copy: both are NaN where a number is
        least, most = parameter.aminmax()
        if not (least.isfinite() & most.isfinite()):
            raise CheckpointError(f"{what}: tensor {name!r} holds {_worst(parameter)}; expected finite weights")


def refuse_logits(model: nn.Module, what: str) -> CheckpointError:
    """Return the error about a model whose logits are not finite: its weights' where they are to blame, or its products'."""
    try:
        require_finite_weights(model, what)
    except CheckpointError as error:
        return error
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return CheckpointError(
        f"{what}: the weights are finite, and the logits computed in {dtype} are not; expected a dtype with a wider range, "
        "such as float32, or other weights"
    )


@torch.inference_mode()
def require_finite_logits(model: nn.Module, ids_BT: Tensor, what: str) -> None:
    """Raise CheckpointError when the logits of a causal model after any of these tokens, (B, T), are not finite."""
    if not model(input_ids=ids_BT, use_cache=False).logits.isfinite().all():
        raise refuse_logits(model, what)


def _worst(tensor: Tensor) -> str:
    return "nan" if tensor.isnan().any() else "infinity"
