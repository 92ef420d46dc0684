"""`python -m easyctx`: the same as the console command."""

import sys

from easyctx.cli import main

sys.exit(main())
