"""Long-context evals. Each eval is four rooms: prompts (no model), scoring (any mode), results, plots.

Read first: `needle.py` (the loop of one eval), `scoring.py` (what every eval asks of a model).
"""
