"""Block-sparse attention (InfLLM-V2): the layers of full attention with another operator and two more tensors to remember."""

from torch import Tensor

from sala.model.attention import FullAttention, cached
from sala.model.cache import CompressedKeys, KeysAndValues
from sala.model.config import MiniCPMSALAConfig
from sala.model.rows import Rows
from sala.ops.infllm import infllm_attention


class SparseAttention(FullAttention):
    """The same parameters as `FullAttention`; each query reads the blocks it selects (InfLLM-V2 paper section 3)."""

    def __init__(self, config: MiniCPMSALAConfig):
        super().__init__(config)
        self.geometry = config.sparse_geometry

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, rows: Rows, cache: KeysAndValues | None) -> Tensor:
        k, v = cached(k_BTGK, v_BTGV, rows, cache)
        fine = coarse = None
        if cache is not None:
            assert isinstance(cache, CompressedKeys)
            fine, coarse = cache.compressed(k, rows)
        return infllm_attention(
            q_BTHK,
            k,
            v,
            fine,
            coarse,
            rows.positions_BT,
            self.geometry,
            scale=self.width**-0.5,
            start=rows.start,
            static=rows.static,
            page_table_BP=rows.page_table_BP,
        )

    @property
    def longest_together(self) -> int:
        # what padding would select does not matter where everything is read
        return min(super().longest_together, self.geometry.num_selected * self.geometry.block_size)

    def attend_rows(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, document_length: int) -> Tensor:
        start = k_BSGK.shape[1] - q_BTHK.shape[1]
        geometry = self.geometry.of_row(document_length)
        return infllm_attention(q_BTHK, k_BSGK, v_BSGV, None, None, None, geometry, scale=self.width**-0.5, start=start)
