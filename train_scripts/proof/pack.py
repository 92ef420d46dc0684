"""What must travel for a proof to go on elsewhere, in parts of at most 15 MB.

    python -m train_scripts.proof.pack --to FOLDER      # there: cat FOLDER/* | tar xz

Results, records and the finished models' files; weights only of the short model, from which controls start, and of the
newest, from which training goes on, or of those that --weights names. Texts and rows are made again, a stage that was
not finished begins anew.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

from easyctx.training.card import RUN_CARD
from easyctx.training.checkpoint_files import CHECKPOINTS
from train_scripts.proof import recipes

PART_BYTES = 15 * 10**6
LEFT_OUT = {"rows", "text", "texts", "start", CHECKPOINTS}
WEIGHTS = ".safetensors"


def files_to_carry(content: recipes.Content, weights: list[str] | None = None) -> list[Path]:
    """weights: the stages whose weights travel. ValueError for one that is not finished."""
    out = Path(content["output"])
    short, longer = recipes.split(content)
    trained = [out / stage["name"] for stage in [*short, *longer] if (out / stage["name"] / RUN_CARD).exists()]
    kept = {trained[-1], out / short[-1]["name"]} if trained else set()
    if weights is not None:
        kept = {out / name for name in weights}
        if missing := sorted(path.name for path in kept.difference(trained)):
            there = ", ".join(path.name for path in trained) or "none"
            raise ValueError(f"--weights {missing[0]} is no finished stage; finished are: {there}")
    finished = {card.parent for card in out.rglob(RUN_CARD)}
    files = []
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        begun = any((parent / "config.json").exists() and parent not in finished for parent in path.parents)
        dropped = LEFT_OUT.intersection(path.relative_to(out).parts[:-1]) or path.name.endswith(".partial") or begun
        if not dropped and (path.suffix != WEIGHTS or path.parent in kept):
            files.append(path)
    return files


def pack(content: recipes.Content, folder: Path, weights: list[str] | None = None) -> list[Path]:
    """Writes the parts of one tar archive; ValueError where there is nothing to carry."""
    files = files_to_carry(content, weights)
    if not files:
        raise ValueError(f"{content['output']} holds nothing yet")
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz", compresslevel=1) as archive:
        for file in files:
            archive.add(file)
    folder.mkdir(parents=True, exist_ok=True)
    view = whole.getbuffer()
    parts = [folder / f"proof.tgz.{number:02d}" for number in range(-(-len(view) // PART_BYTES))]
    for number, part in enumerate(parts):
        part.write_bytes(view[number * PART_BYTES : (number + 1) * PART_BYTES])
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("train_scripts/proof/proof.yaml"))
    parser.add_argument("--to", type=Path, required=True, help="folder for the parts")
    parser.add_argument(
        "--weights",
        nargs="*",
        metavar="STAGE",
        help="of these stages alone (default: the last short and the newest)",
    )
    args = parser.parse_args()
    try:
        parts = pack(recipes.load(args.recipe), args.to, args.weights)
    except ValueError as error:
        parser.error(str(error))
    print(f"proof: {sum(part.stat().st_size for part in parts) / 1e6:.1f} MB in {len(parts)} parts in {args.to}")


if __name__ == "__main__":
    main()
