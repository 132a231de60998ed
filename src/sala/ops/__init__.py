"""Operators: functions on tensors with interchangeable backends; no modules, configurations or files.

The project's legend for shapes, used in docstrings, suffixes and trailing comments:

    B batch             T new tokens            S all tokens seen
    H query heads       G key/value heads       D model width
    K key width         V value width           F MLP width
    X vocabulary        C tokens in a chunk or block    N number of chunks, blocks or windows
"""
