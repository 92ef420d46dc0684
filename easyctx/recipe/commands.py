"""The commands of a recipe, in their order: data, stages, the last RoPE base."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from easyctx.recipe.read import Recipe, Stage
from easyctx.recipe.words import data_words, flag_words

CONFIGS = Path("accelerate_configs")
BESIDE_PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Node:
    """Which of a run's machines this is; in a script its variables stand in for what is not known yet."""

    rank: str = "$MACHINE_RANK"
    first: str = "$FIRST_NODE"
    port: str = "$PORT"


@dataclass(frozen=True)
class Command:
    """One command, as a person types it."""

    words: list[str]

    @property
    def argv(self) -> list[str]:
        """The same for this Python, whose scripts need not be on the PATH."""
        programs = {"accelerate": "accelerate.commands.accelerate_cli", "easyctx": "easyctx.cli"}
        first, rest = self.words[0], self.words[1:]
        return [sys.executable, *(rest if first == "python" else ["-m", programs[first], *rest])]

    def __str__(self) -> str:
        return " ".join(quote(word) for word in self.words)

    def lines(self, width: int = 110) -> list[str]:
        """The command over several lines, for a script; a flag stays with its values."""
        groups: list[list[str]] = []
        for word in self.words:
            if groups and not word.startswith("-"):
                groups[-1].append(quote(word))
            else:
                groups.append([quote(word)])
        lines = [""]
        for group in (" ".join(group) for group in groups):
            if lines[-1] and len(lines[-1]) + len(group) > width:
                lines.append(f"  {group}")
            else:
                lines[-1] += f" {group}" if lines[-1] else group
        return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def quote(word: str) -> str:
    """A word for the shell; variables of a script stay variables."""
    return f'"{word}"' if word.startswith("$") else shlex.quote(word)


def data_command(stage: Stage) -> Command:
    assert stage.data is not None
    return Command(["easyctx", "data", *data_words(stage.data)])


def train_command(stage: Stage, node: Node | None = None) -> Command:
    """The launch of a stage. node: where there are several; by default in a script's variables."""
    launch = ["accelerate", "launch", "--config_file", str(engine_file(stage.engine))]
    launch += ["--num_processes", str(stage.processes)]
    if stage.nodes > 1:
        node = node or Node()
        launch += ["--num_machines", str(stage.nodes), "--machine_rank", node.rank]
        launch += ["--main_process_ip", node.first, "--main_process_port", node.port]
    else:
        launch += ["--main_process_port", "0"]  # a free one
    return Command([*launch, "-m", "easyctx.train", *flag_words(stage.flags)])


def final_command(recipe: Recipe) -> Command | None:
    """What gives the finished model its last RoPE base, where the recipe has one."""
    if recipe.final_rope_theta is None:
        return None
    flags = {
        "model": recipe.stages[-1].output,
        "output": recipe.final,
        "rope_theta": f"{recipe.final_rope_theta:g}",
    }
    return Command(["python", "-m", "easyctx.recipe.final", *flag_words(flags)])


def engine_file(engine: str) -> Path:
    """The accelerate configuration that is meant: a path, or a name in accelerate_configs/."""
    if engine.endswith((".yaml", ".yml", ".json")):
        return Path(engine)
    relative = CONFIGS / f"{engine}.yaml"
    beside = BESIDE_PACKAGE / relative
    return relative if relative.is_file() or not beside.is_file() else beside


def engine_names() -> list[str]:
    folder = CONFIGS if CONFIGS.is_dir() else BESIDE_PACKAGE / CONFIGS
    return sorted(path.stem for path in folder.glob("*.yaml"))
