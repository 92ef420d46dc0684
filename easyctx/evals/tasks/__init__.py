"""Evals whose answers are generated: LongChat, NarrativeQA, RULER.

Read first: `longchat.py` (what one eval says about itself), `runner.py` (what all of them do with it).
"""
