"""What attention, a training step and a whole run cost in time, by arithmetic alone: no GPU, no processes.

`hardware.py` and `kernels.py` hold the rates, each with its source; `blocks.py` and `walk.py` follow the schedules
message by message; `attention.py` and `step.py` put times on that; `choose.py` picks a mode; `plan.py` a run.
"""
