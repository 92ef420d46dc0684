"""Command lines: their own errors are one line, as all others of ours are."""

import argparse
import os
import sys
import time
from typing import NoReturn

PATIENCE = 20.0  # seconds, in which the first rank should have come as far as another


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in a last line, not under a page of flags."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        print_once(f"{message}; --help lists all that can be given")
        self.exit(2)


def print_once(message: str) -> None:
    """An error that all ranks find, each before it leaves: the first says so, and the others wait for it.

    A launcher ends all processes as soon as one leaves with an error, the first perhaps before it could speak. A rank
    that nothing ends meanwhile was alone in finding the error, and says so after all.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(PATIENCE)
    print(f"error{'' if rank == '0' else f' on rank {rank}'}: {message}", file=sys.stderr, flush=True)
