"""A user's whole training step: model with head, loss, dropout and AdamW, launched from Python.

    python -m benchmarks.user run --scenarios llama1b,vitb --choices eager,default --budget 540
    python -m benchmarks.user run --scenarios lora8b-4k --longest 80
    python -m benchmarks.user table
    python -m benchmarks.user plot

`scenarios.py` says what is trained, `choices.py` what a user could do about its memory, `worker.py`
what is measured and how it is checked, `runner.py` how processes take turns, `show.py` makes tables
and pictures of the rows. There are no data loader, no clipping of gradients and no schedule.
"""
