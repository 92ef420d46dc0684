"""`easyctx recipe`: a context extension in stages, each a run of the train loop from the last one's weights.

read.py     the YAML file -> a Recipe
check.py    all that can be checked before the first stage starts
commands.py the commands of a recipe, one by one
run.py      runs them, skips what is finished, keeps the record
"""
