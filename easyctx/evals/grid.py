"""Lengths and depths from the command line."""

from __future__ import annotations

import argparse


def add_length_arguments(parser: argparse.ArgumentParser, default: list[int]) -> None:
    """--lengths, or --min-length, --max-length and --num-lengths."""
    lengths = parser.add_argument_group("lengths")
    lengths.add_argument("--lengths", type=int, nargs="+", help=f"in tokens (default: {' '.join(map(str, default))})")
    lengths.add_argument("--min-length", type=int, help="the shortest of --num-lengths evenly spaced lengths")
    lengths.add_argument("--max-length", type=int, help="the longest of them")
    lengths.add_argument("--num-lengths", type=int, help="how many of them")
    parser.set_defaults(default_lengths=default)


def lengths_of(args: argparse.Namespace) -> list[int]:
    """The sorted lengths that were asked for. Raises ValueError for none, or both ways at once."""
    spaced = (args.min_length, args.max_length, args.num_lengths)
    if args.lengths and any(value is not None for value in spaced):
        raise ValueError("give --lengths, or --min-length, --max-length and --num-lengths, not both")
    if any(value is not None for value in spaced):
        lengths = _spaced_lengths(*spaced)
    else:
        lengths = sorted(set(args.lengths or args.default_lengths))
    if lengths[0] < 2:
        raise ValueError(f"the length {lengths[0]} is too short; give at least 2 tokens")
    return lengths


def _spaced_lengths(low: int | None, high: int | None, number: int | None) -> list[int]:
    if low is None or high is None or number is None:
        raise ValueError("--min-length, --max-length and --num-lengths go together; one of them is missing")
    if low > high:
        raise ValueError(f"--min-length is {low}, but --max-length only {high}")
    if number < 1 or (number == 1 and low != high):
        raise ValueError(f"--num-lengths is {number}; from {low} to {high} give at least 2")
    return sorted({round(low + (high - low) * step / max(number - 1, 1)) for step in range(number)})


def depths_of(values: list[str]) -> list[float]:
    """Depths in percent, to a tenth: evenly from 0 to 100 for one whole number, else the list itself.

    A single "50%" (or "50.0") is that depth. Raises ValueError for what is outside 0 to 100.
    """
    try:
        if len(values) == 1 and values[0].isdigit():
            number = int(values[0])
            if number < 2:
                raise ValueError(f"--depths {number} asks for {number} depths; give 2 or more, or a depth like 50%")
            return [round(100 * step / (number - 1), 1) for step in range(number)]
        depths = [float(value.removesuffix("%")) for value in values]
    except ValueError as error:
        if "--depths" in str(error):
            raise
        raise ValueError(f"--depths has {values}; give a number of depths, or depths in percent") from None
    outside = [depth for depth in depths if not 0 <= depth <= 100]
    if outside:
        raise ValueError(f"--depths has {outside[0]:g}, which is outside 0 to 100 percent")
    return sorted({round(depth, 1) for depth in depths})
