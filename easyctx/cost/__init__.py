"""What attention, a training step and a whole run cost in time, by arithmetic alone: no GPU, no processes.

`hardware.py` and `kernels.py` hold the rates, each with its source; `stages.py` has what a schedule is made of, and
`ring_walk.py`, `dist_flash_walk.py` and `ulysses_walk.py` follow the schedules message by message; `flops.py` counts a
model's arithmetic; `attention.py` and `step.py` put times on all that; `choose.py` picks a mode; `plan.py` a run.
"""
