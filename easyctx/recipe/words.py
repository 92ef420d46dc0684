"""Settings as the words of a command line, and back: a recipe's values are checked by the commands they go to."""

import argparse
from dataclasses import fields
from typing import Any, NoReturn

from easyctx.data import command as data_command
from easyctx.data.settings import DataSettings


class RaisingParser(argparse.ArgumentParser):
    """A parser of command lines whose errors can be told with the stage they are in."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def flag_words(flags: dict[str, Any]) -> list[str]:
    """Settings as words of a command line. True is a flag without a value; None and False leave it out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is False and name == "double_quant":  # which is so by itself
            words.append("--no-double-quant")
        if value is None or value is False:
            continue
        flag = f"--{name}" if name in ("parallel_mode", "ring_degree") else f"--{name.replace('_', '-')}"
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words += [flag, *(str(each) for each in values)]
    return words


def data_words(settings: DataSettings) -> list[str]:
    """What follows `easyctx data`; values that are the command's own are left out."""
    defaults = {field.name: field.default for field in fields(DataSettings)}
    words = list(settings.inputs)
    for name, default in defaults.items():
        value = getattr(settings, name)
        if name == "inputs" or value == default:
            continue
        # --bos and --eos can be refused; what else is False is so by itself.
        words += [f"--no-{name}"] if value is False and name in ("bos", "eos") else flag_words({name: value})
    return words


def parse_data(words: list[str]) -> DataSettings:
    """The settings that `easyctx data` would read from these words; ValueError for bad ones."""
    parser = RaisingParser(prog="easyctx data", allow_abbrev=False)
    data_command.add_arguments(parser)
    given = vars(parser.parse_args(words))
    given["inputs"] = tuple(given["inputs"])
    return DataSettings(**{field.name: given[field.name] for field in fields(DataSettings)})
