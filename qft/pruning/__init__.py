"""Pruning: smaller models out of larger ones, as ordinary model folders.

`layer_stream` runs rows through a model with one layer's weights in memory. `sparsity` says how
many weights of a matrix become zero; `smallest` and `sparsegpt` choose them.
"""
