"""`easyctx check`: the user's own proof that sharded training of their architecture equals one process.

`command` is the command line, `run` what it does; in the order in which they are used: `source` finds the
configuration, `shrink` makes it small, `probe` looks at its attention, `steps` trains it in one process and
(`launch`) on ranks, `compare` judges, `report` prints.
"""
