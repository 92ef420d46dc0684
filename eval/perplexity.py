"""Perplexity by length. `python eval/perplexity.py --help`; the eval itself is easyctx/evals/perplexity.py."""

from easyctx.evals.perplexity import main

if __name__ == "__main__":
    raise SystemExit(main())
