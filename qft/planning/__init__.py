"""Will it fit? Two training steps on fake tensors, what the meter cannot see, and what to change.

A plan is made of phases (load, train, evaluate, save, merge, export), each with bytes by category:

    job.py            what is planned: a recipe, its model's shape, its rows or imagined ones
    fake_training.py  training's own step on fake tensors: no weights, exact bytes
    amounts.py        what a phase takes of the device, the host and the disk
"""
