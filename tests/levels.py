"""The levels of C++ that tests run at."""

from sala.ops import native

HERE = native.levels_here()
# what it has over avx512, integer products, avx512-bf16 has too: building and testing both would tell nothing new
TESTED = tuple(level for level in HERE if not (level == "avx512-vnni" and "avx512-bf16" in HERE))
