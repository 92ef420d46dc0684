"""What `train_step.py` and `lora_step.py` are made of: ways to take a training step, and how one is measured.

shapes.py, models.py, settings.py   models, their work, the train loop's flags
child.py, run.py, rows.py           a method in processes of its own: who looks after them, what they do, their rows
method.py, own.py                   a model under an engine; easyctx's way
layers_timed.py                     some layers run, the memory of the others taken beside them
rivals.py, alst.py, loss.py         others' ways
measure.py, chart.py                seconds and peaks of a step; the chart
"""
