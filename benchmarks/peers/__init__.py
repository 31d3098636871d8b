"""qft beside plain PEFT, TRL and Unsloth: the same job, by one instrument, on a CPU.

    python -m benchmarks.peers --case alpaca-135m --sides plain unsloth qft

One long-lived process a side. A driver lets them take turns, a block of optimizer steps each, so
that whatever else the machine does falls on all of them alike. `cases` makes the jobs, `driver`
gives the turns, `blocks` measures inside a side, `sides/` holds the sides.
"""
