"""What a command line that cannot be read is answered with."""

import importlib
from collections.abc import Callable

import pytest

from easyctx import cli, parser, train
from easyctx.evals.command import EVALS
from easyctx.recipe import final

OF_THE_COMMAND = [
    (cli.main, ["data"], "arguments are required: --tokenizer, --seq-length"),
    (
        cli.main,
        ["plan", "--model", "x", "--gpu", "h100", "--gpus", "many"],
        "argument --gpus: invalid int value: 'many'",
    ),
    (cli.main, ["recipe", "a.yaml", "--dryrun"], "unrecognized arguments: --dryrun"),
    (cli.main, ["check", "--sp"], "argument --sp: expected one argument"),
    (cli.main, ["merge"], "arguments are required"),
    (cli.main, ["evaluate"], "argument COMMAND: invalid choice: 'evaluate'"),
    (cli.main, [], "arguments are required: COMMAND"),
    (train.main, ["--model", "x"], "arguments are required: --dataset, --output-dir"),
    (final.main, [], "arguments are required: --model, --output, --rope-theta"),
]
OF_THE_EVALS = [(cli.main, ["eval", name, "--no-such-flag"], "") for name in EVALS]
OF_THEIR_MODULES = [(importlib.import_module(module).main, ["--no-such-flag"], "") for module, _ in EVALS.values()]


@pytest.mark.parametrize(("main", "arguments", "said"), [*OF_THE_COMMAND, *OF_THE_EVALS, *OF_THEIR_MODULES])
def test_one_line_says_what_is_wrong(
    main: Callable[[list[str]], int], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("error: ")
    assert line.endswith("; --help lists all that can be given")
    assert said in line


def test_the_first_of_several_processes_says_so_or_another_after_waiting_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends all at the first that leaves, so another must not leave before the first has spoken."""
    said_before_waiting = []
    monkeypatch.setattr(parser.time, "sleep", lambda _: said_before_waiting.append(capsys.readouterr().err))
    for rank, waits, start in (("0", [], "error: "), ("1", [""], "error on rank 1: ")):
        monkeypatch.setenv("RANK", rank)
        said_before_waiting.clear()
        with pytest.raises(SystemExit) as ended:
            train.main(["--model", "x"])
        assert ended.value.code == 2
        assert said_before_waiting == waits
        assert capsys.readouterr().err.startswith(start)
