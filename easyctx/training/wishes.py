"""What the flags about memory ask of the policy."""

from easyctx.memory.policy import Wishes
from easyctx.training.config import TrainConfig


def wishes_of(config: TrainConfig) -> Wishes:
    """What the flags force.

    Raises:
        ValueError: flags that contradict each other.
    """
    forced = {
        "--keep-inputs": config.keep_inputs,
        "--keep-attention": config.keep_attention,
        "--checkpoint-every": config.checkpoint_every,
        "--mlp-tile": config.mlp_tile,
        "--tiled-norms": config.tiled_norms,
        "--head-groups": config.head_groups,
    }
    given = [flag for flag, value in forced.items() if value not in (None, "auto")]
    if config.memory == "off" and (given or config.recompute != "auto"):
        raise ValueError(f"--memory off leaves the model as it is: leave out {', '.join(given) or '--recompute'}")
    about_checkpoints = [flag for flag in given if flag in ("--keep-inputs", "--keep-attention", "--checkpoint-every")]
    if config.recompute == "none" and about_checkpoints:
        raise ValueError(f"--recompute none keeps everything, and {about_checkpoints[0]} says what to keep: choose one")
    kept = {"auto": None, "none": None, "keep-attention": "kept", "all": "recompute"}[config.recompute]
    if config.keep_attention != "auto":
        if kept is not None and (kept == "recompute") != (config.keep_attention == "recompute"):
            raise ValueError(
                f"--recompute {config.recompute} contradicts --keep-attention {config.keep_attention}: leave one out"
            )
        kept = config.keep_attention
    return Wishes(
        inputs=None if config.keep_inputs == "auto" else config.keep_inputs,
        attention=kept,
        everything=True if config.recompute == "none" else None,
        every=config.checkpoint_every,
        mlp_tile=config.mlp_tile,
        tiled_norms={"auto": None, "yes": True, "no": False}[config.tiled_norms],
        head_groups=config.head_groups,
    )
