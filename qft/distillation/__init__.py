"""Learning from a teacher: what it says of each example, live or cached, and the losses made of it.

`objective.py` has every knob. A teacher's word on one example is a lesson (`lessons.py`), given by
a teacher in memory (`live.py`) or by a cache of one; `distilled_loss.py` makes the loss of it that
`qft/step.py` minimises.
"""
