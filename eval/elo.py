"""Elo ratings by a judge. `python eval/elo.py --help`; the eval is easyctx/evals/elo.py."""

from easyctx.evals.elo import main

if __name__ == "__main__":
    raise SystemExit(main())
