"""What `attention.py`, `ring_error.py` and `parity.py` are made of: cases, what runs them, and how that is measured.

cases.py, methods.py   a case and its tensors; easyctx's modes and the local kernels
rivals.py, flash_attn_stand_in.py   other packages' attention; flash-attn 2's functions where it is not installed
loopback.py            a mode on one GPU that plays one of several ranks
timing.py, sample.py   milliseconds; errors against float64 from a sample of rows
errors.py              errors of all rows, for short sequences
chart.py               the chart
"""
