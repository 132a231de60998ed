"""Keys and values in pages of a pool, as serving keeps them: rows of any lengths in one memory, shared beginnings once.

A compressed key lies in the page of its window's last token, so that a full page has all its own: window j of a row, of
`size` tokens each `stride` after the last, is at place j + (size - 1) // stride when the places of the row's pages, one a
stride, are counted through.
"""

import torch
from torch import Tensor

from sala.errors import InputError


def rows_of_pages(k_NCGK: Tensor, v_NCGV: Tensor, page_table_BP: Tensor, block_size: int = 1) -> tuple[Tensor, Tensor]:
    """Return tensors of the shapes that the rows' keys and values have room for, (B, P * C, G, width), to be checked.

    They take no memory; their numbers are not those of the rows.

    Raises:
        InputError: no pages, or of a size that blocks do not fill; a table of another shape, dtype or device.
    """
    if k_NCGK.ndim != 4 or v_NCGV.ndim != 4 or k_NCGK.shape[:3] != v_NCGV.shape[:3] or not k_NCGK.shape[0]:
        raise InputError(
            f"pages of keys {tuple(k_NCGK.shape)} and values {tuple(v_NCGV.shape)} do not fit: they must be "
            "(num_pages, page_size, G, K) and (num_pages, page_size, G, V), of at least one page"
        )
    page_size = k_NCGK.shape[1]
    if not page_size or page_size % block_size:
        raise InputError(f"a page must hold whole blocks of {block_size} tokens, not {page_size} tokens")
    if page_table_BP.ndim != 2 or page_table_BP.dtype != torch.int32 or page_table_BP.device != k_NCGK.device:
        raise InputError(
            f"the page table must be int32 of shape (B, max_pages) on {k_NCGK.device}, not {page_table_BP.dtype} of "
            f"shape {tuple(page_table_BP.shape)} on {page_table_BP.device}"
        )
    B, P = page_table_BP.shape
    k_BSGK, v_BSGV = (x[:1, :1].expand(B, P * page_size, -1, -1) for x in (k_NCGK, v_NCGV))
    return k_BSGK, v_BSGV


def last_positions(page_table_BP: Tensor, positions_BT: Tensor | None, start: int | None, length: int) -> Tensor:
    """Return each row's last position, (B,): of `length` tokens from `start` on (or 0, in a static call), or by positions."""
    if start is None and positions_BT is not None and positions_BT.shape[1]:
        return positions_BT.amax(1)
    return page_table_BP.new_full((len(page_table_BP),), (start or 0) + length - 1)


def check_pages(page_table_BP: Tensor, last_B: Tensor, k_NCGK: Tensor, start: int | None) -> None:
    """Check the pages that are read, by rows whose last position is `last_B`; not where a device would be waited for.

    Raises:
        InputError: a page that does not exist.
    """
    if (start is not None and not page_table_BP.is_cpu) or torch.compiler.is_compiling():
        return
    num_pages, page_size = k_NCGK.shape[:2]
    wrong_BP = _used(page_table_BP, last_B, page_size) & ((page_table_BP < 0) | (page_table_BP >= num_pages))
    if wrong_BP.any():
        b, place = wrong_BP.nonzero()[0].tolist()
        raise InputError(
            f"row {b} reads up to position {int(last_B[b])}, and entry {place} of its page table is "
            f"{int(page_table_BP[b, place])}: there are pages 0 to {num_pages - 1}"
        )


def in_order(x_NCGK: Tensor, page_table_BP: Tensor, last_B: Tensor) -> Tensor:
    """Return the rows' keys or values, (B, P * C, G, width), differentiable; what no row reads may be anything."""
    # entries that are not used need not be pages
    pages_BP = page_table_BP.masked_fill(~_used(page_table_BP, last_B, x_NCGK.shape[1]), 0)
    return x_NCGK[pages_BP].flatten(1, 2)


def windows_in_order(k1_NCGK: Tensor, page_table_BP: Tensor, size: int, stride: int) -> Tensor:
    """Return the rows' compressed keys, (B, N, G, K), as many as the table has places for; what no row has may be anything."""
    page_places = k1_NCGK.shape[1]
    first = (size - 1) // stride
    place_N = torch.arange(first, page_table_BP.shape[1] * page_places, device=page_table_BP.device)
    # entries that are not used need not be pages
    page_BN = page_table_BP.long().clamp(0, len(k1_NCGK) - 1)[:, place_N // page_places]
    return k1_NCGK[page_BN, place_N % page_places]


def check_window_pages(k1_NCGK: Tensor, k_NCGK: Tensor, stride: int, name: str) -> None:
    """Check that compressed keys lie in the pages of the keys they are of.

    Raises:
        InputError: another number of pages, or of places in one.
    """
    N, page_size, G, K = k_NCGK.shape
    if k1_NCGK.shape != (N, page_size // stride, G, K) or page_size % stride:
        raise InputError(
            f"{name} of keys in {N} pages of {page_size} tokens, one each {stride} tokens, have shape "
            f"{tuple(k1_NCGK.shape)}; expected {(N, page_size // stride, G, K)}"
        )


def _used(page_table_BP: Tensor, last_B: Tensor, page_size: int) -> Tensor:
    first_token_P = torch.arange(page_table_BP.shape[1], device=page_table_BP.device) * page_size
    return first_token_P <= last_B[:, None]
