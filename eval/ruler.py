"""RULER. `python eval/ruler.py --help`; the eval is easyctx/evals/tasks/ruler.py."""

from easyctx.evals.tasks.ruler import main

if __name__ == "__main__":
    raise SystemExit(main())
