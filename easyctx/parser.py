"""Command lines: their own errors are one line, as all others of ours are."""

import argparse
import os
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in a last line, not under a page of flags."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2. All ranks find the same, and the first says so."""
        said = f"error: {message}; --help lists all that can be given\n"
        self.exit(2, said if os.environ.get("RANK", "0") == "0" else None)
