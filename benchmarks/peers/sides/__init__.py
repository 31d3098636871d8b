"""One script a toolkit: each trains in a process of its own, block by block.

Another toolkit's side must run where qft is not installed, so these files take from this
repository only `benchmarks.peers.channel` and `benchmarks.peers.blocks`.
"""
