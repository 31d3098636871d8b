"""`qft report`: a run as one HTML page that needs nothing else, not even a script.

escaping.py    what a run says, made harmless: markup, control characters, paths, secrets
numbers.py     counts, bytes, durations and axis ticks as people read them
drawing.py     SVG elements, colours, and the frame of a chart
bars.py        the plan: a stacked bar a phase, against the budget
lines.py       what changes over the steps of a run
story.py       what a run folder tells, read with distrust
samples.py     a few training rows and their masks, kept when the training begins
figures.py     the charts of a run
sections.py    the parts of the page
page.py        the page
"""
