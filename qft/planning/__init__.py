"""Will it fit? Two training steps on fake tensors, what the meter cannot see, and what to change.

A plan is made of phases (load, train, evaluate, save, merge, export), each with bytes by category:

    job.py            what is planned: a recipe, its model's shape, its rows or imagined ones
    fake_training.py  training's own step on fake tensors: no weights, exact bytes
    amounts.py        what a phase takes of the device, the host and the disk
    phases.py         load, train, evaluate and save; loading.py, evaluating.py, generating.py and
                      saving.py know one each, caches.py what lies on the disk beside a run
    held_model.py     a model without a byte, quantized as it will be held
    stored_weights.py what its files hold, or would
"""
