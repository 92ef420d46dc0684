"""One HTML page of results. `python eval/report.py --help`; it is easyctx/evals/report.py."""

from easyctx.evals.report import main

if __name__ == "__main__":
    raise SystemExit(main())
