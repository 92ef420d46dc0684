"""LongChat topics and lines. `python eval/longchat.py --help`; the eval is easyctx/evals/tasks/longchat.py."""

from easyctx.evals.tasks.longchat import main

if __name__ == "__main__":
    raise SystemExit(main())
