"""Will it fit? Two training steps on fake tensors, what the meter cannot see, and what to change.

A plan is made of phases (load, train, evaluate, save, merge, export), each with bytes by category:

    job.py            what is planned: a recipe, its model's shape, its rows or imagined ones
    flat_rows.py      whether its examples may lie in one long row
    fake_training.py  training's own step on fake tensors: no weights, exact bytes; beside it
                      skeletons.py, fake_optimizer.py, fake_loss.py, fake_lessons.py (a teacher's)
                      and known_values.py (what a real batch says of itself)
    measured_step.py  a real training's step, to compare with
    amounts.py        what a phase takes of the device, the host and the disk
    phases.py         load, train, evaluate and save; loading.py, evaluating.py, generating.py and
                      saving.py know one each, caches.py what lies on the disk beside a run
    afterwards.py     merge and export, when the training is over; shape_source.py: what they write
    stored_weights.py what its files hold, or would
"""
