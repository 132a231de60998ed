"""The token ids that a cache has read, so that another text is not taken for its continuation."""

import torch
from torch import Tensor


class SeenTokens:
    """Ids (B, S) int64, kept as they came; unknown from the first call on that gave none."""

    def __init__(self) -> None:
        self.parts: list[Tensor] | None = []

    def append(self, ids_BT: Tensor | None) -> None:
        # a compiled program would be compiled again for every length of the list
        if ids_BT is None or self.parts is None or torch.compiler.is_compiling():
            self.parts = None
        else:
            self.parts.append(ids_BT.detach().clone())

    def tokens(self) -> Tensor | None:
        """Return all of them, (B, S), None where they are not known or there are none."""
        if not self.parts:
            return None
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts, dim=1)]
        return self.parts[0]

    def cut(self, length: int) -> None:
        """Forget those from place `length` on; if there are fewer, what lies between is not known."""
        ids_BT = self.tokens()
        known = 0 if ids_BT is None else ids_BT.shape[1]
        if length == 0:
            self.parts = []
        elif ids_BT is None or known < length:
            self.parts = None
        else:
            self.parts = [ids_BT[:, :length]]

    def select(self, rows: Tensor) -> None:
        ids_BT = self.tokens()
        if ids_BT is not None:
            self.parts = [ids_BT.index_select(0, rows.to(ids_BT.device))]
