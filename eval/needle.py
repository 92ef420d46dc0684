"""Needle in a haystack. `python eval/needle.py --help`; the eval itself is easyctx/evals/needle.py."""

from easyctx.evals.needle import main

if __name__ == "__main__":
    raise SystemExit(main())
