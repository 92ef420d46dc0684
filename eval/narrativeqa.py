"""NarrativeQA by token F1. `python eval/narrativeqa.py --help`; the eval is easyctx/evals/tasks/narrativeqa.py."""

from easyctx.evals.tasks.narrativeqa import main

if __name__ == "__main__":
    raise SystemExit(main())
