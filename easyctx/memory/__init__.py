"""What a training step keeps, where it keeps it, and what it computes again: so that a length fits.

budget.py   bytes of a step: model, length, engine and choices in, a breakdown out (no GPU, no processes)
"""
