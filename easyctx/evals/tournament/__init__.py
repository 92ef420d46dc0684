"""Models compared in pairs by a judge. Read first: `ratings.py` (what is computed), `judge.py` (who is asked)."""
