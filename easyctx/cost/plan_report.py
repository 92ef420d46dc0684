"""A plan as text, as JSON, and the command that starts it."""

from dataclasses import asdict
from typing import Any

from easyctx.cost.hardware import GIB
from easyctx.cost.kernels import kernel_rates
from easyctx.cost.models import name_for_training
from easyctx.cost.plan import Plan, Request, step_name
from easyctx.cost.step import StepCost
from easyctx.memory.adapters import trained_parameters
from easyctx.memory.budget import Breakdown
from easyctx.memory.describe import describe_choices, remarks, why_not
from easyctx.memory.engines import get_engine

NOTE = "All figures are predicted from sizes and rates (easyctx/cost, easyctx/memory); nothing was run."


def report(plan: Plan, model: str, source: str) -> list[str]:
    """Lines to print."""
    request, device = plan.request, plan.request.device
    nodes = f"{request.nodes} node{'s' if request.nodes > 1 else ''}"
    lines = [
        f"{model}: {request.model.parameters / 1e9:.2f} billion parameters ({source}){_trained(request)}",
        f"{request.gpus} x {device.name}, {request.gpu_memory / GIB:.4g} GiB each, on {nodes} with "
        f"{request.host_memory / GIB:.4g} GiB of host memory; engine {request.engine}; attention kernel "
        f"{kernel_rates(device, request.kernel).name}",
        "",
        f"longest sequence that fits: {plan.longest:,} tokens ({plan.longest // request.sharing:,} on each of "
        f"{request.sharing} GPU{'s' if request.sharing > 1 else ''} that share it)",
        "",
        f"at {plan.length:,} tokens with {_label(plan)}:",
    ]
    if plan.decision is None:
        return [*lines, f"  {_refusal(plan)}"]
    lines += [f"  {part}" for part in describe_choices(plan.decision.choices).split("; ")]
    lines += [f"  {remark}" for remark in remarks(plan.decision)]
    lines += ["", *memory_table(plan.decision.predicted, request.gpu_memory, request.host_memory), ""]
    lines += [
        *step_table(plan.steps, _label(plan)),
        "",
        "start it with:",
        *(f"  {line}" for line in launch(plan, model)),
        "",
        NOTE,
    ]
    return lines


def _trained(request: Request) -> str:
    """What of them is trained, and by what, where it is not all of them by AdamW and the model's own modules."""
    of, model = request.model.adapters, request.model
    said = "" if of is None else f"; LoRA of rank {of.rank} trains {trained_parameters(model) / 1e6:,.1f} million"
    if of is not None and of.quantize:
        scales = " with quantised scales" if of.double_quant else ""
        said += f", beside weights in {of.quantize.upper()}{scales}"
    said += "" if request.optimizer == "adamw" else f"; optimizer {request.optimizer}"
    return said + ("; Liger's kernels" if model.fused else "")


def _further_flags(plan: Plan) -> str:
    """A last line of the command; empty where there is nothing to say."""
    request = plan.request
    of, flags = request.model.adapters, []
    if of is not None:
        flags.append(f"--lora-r {of.rank}")
        if set(of.targets) != set(request.model.matrix_names):
            flags.append(f"--lora-targets {' '.join(of.targets)}")
        trained = ["embeddings"] * of.embeddings + ["norms"] * of.norms
        flags += [f"--lora-train {' '.join(trained)}"] if trained else []
        flags += [f"--quantize {of.quantize}"] if of.quantize else []
        flags += ["--no-double-quant"] if of.quantize and not of.double_quant else []
    if request.optimizer != "adamw":
        flags.append(f"--optimizer {request.optimizer}")
    flags += ["--liger"] if request.model.fused else []
    flags += ["--loss tiled"] if plan.asks_tiled else []
    return " ".join(flags)


def _label(plan: Plan) -> str:
    return step_name(plan.mode, plan.ring_degree)


def _refusal(plan: Plan) -> str:
    assert plan.closest is not None
    request = plan.request
    tokens = request.batch * -(-plan.length // request.sharing)
    return why_not(plan.closest, request.budget, tokens, plan.longest, plan.length, request.sharing)


def memory_table(predicted: Breakdown, gpu_memory: float, host_memory: float) -> list[str]:
    lines = [f"{'memory, GiB':34}{'a GPU':>10}{'a host':>10}"]
    names = [*predicted.gpu, *(name for name in predicted.host if name not in predicted.gpu)]
    for name in names:
        cells = [predicted.gpu.get(name), predicted.host.get(name)]
        lines.append(f"  {name:32}" + "".join(f"{'' if c is None else f'{c / GIB:.2f}':>10}" for c in cells))
    lines.append(f"  {'predicted peak':32}{predicted.gpu_peak / GIB:10.2f}{predicted.host_peak / GIB:10.2f}")
    lines.append(f"  {'there is':32}{gpu_memory / GIB:10.2f}{host_memory / GIB:10.2f}")
    return [*lines, f"  the GPU's peak is in the {predicted.moment}"]


def step_table(steps: dict[str, StepCost], chosen: str) -> list[str]:
    """Time per step by mode; the chosen one has a star."""
    heads = ("seconds", "tokens/s", "MFU", "attention", "again", "matrices", "between", "waiting", "optimizer")
    lines = ["predicted step".ljust(34) + "".join(head.rjust(11) for head in heads)]
    for mode, cost in steps.items():
        parts = cost.parts
        waiting = parts["waiting for the host"] + parts["waiting for weights and gradients"]
        between = parts["norms, RoPE, MLP activation, loss"]
        figures = [parts["attention"], parts["attention again"], parts["matrices"], between, waiting]
        cells = [f"{cost.seconds:,.4g}", f"{cost.tokens_per_s:,.0f}", f"{cost.mfu:.1%}"]
        cells += [f"{seconds:,.3g}" for seconds in (*figures, parts["optimizer"])]
        lines.append(f"  {mode + ' *' * (mode == chosen):32}" + "".join(cell.rjust(11) for cell in cells))
    return lines


def launch(plan: Plan, model: str) -> list[str]:
    """The command, over several lines."""
    request, mode = plan.request, plan.mode
    processes = f"--num_processes {request.gpus}"
    if request.nodes > 1:
        processes += f" --num_machines {request.nodes} --machine_rank RANK --main_process_ip FIRST_NODE"
        processes += " --main_process_port 29500"
    sharing = f" --sp-degree {request.sharing}" if mode != "data_parallel" and request.sharing < request.gpus else ""
    degree = f" --ring_degree {plan.ring_degree}" if plan.ring_degree else ""
    further = _further_flags(plan)
    return [
        f"accelerate launch --config_file accelerate_configs/{request.engine}.yaml \\",
        f"  {processes} -m easyctx.train \\",
        f"  --model {name_for_training(model)} --dataset DATA --output-dir OUTPUT --seq-length {plan.length} \\",
        f"  --batch-size {request.batch} --gradient-accumulate-every {request.accumulate} \\",
        f"  --parallel_mode {mode}{degree}{sharing}" + (" \\" if further else ""),
        *([f"  {further}"] if further else []),
    ]


def as_json(plan: Plan, model: str, source: str) -> dict[str, Any]:
    """All that was found, in bytes, seconds and tokens; every figure is a prediction."""
    request, decision = plan.request, plan.decision or plan.closest
    assert decision is not None
    return {
        "note": NOTE,
        "model": {"name": model, "source": source, **asdict(request.model), "parameters": request.model.parameters},
        "gpu": request.device.name,
        "gpus": request.gpus,
        "nodes": request.nodes,
        "engine": request.engine,
        "optimizer": request.optimizer,
        "gpu_memory": int(request.gpu_memory),
        "host_memory": int(request.host_memory),
        "batch": request.batch,
        "accumulate": request.accumulate,
        "longest_seq_length": plan.longest,
        "seq_length": plan.length,
        "fits": plan.decision is not None,
        "parallel_mode": plan.mode,
        "ring_degree": plan.ring_degree,
        "choices": asdict(decision.choices),
        "pins": plan.decision.pins and get_engine(request.engine).pins if plan.decision else None,
        "predicted_gpu_bytes": {**decision.predicted.gpu, "peak": decision.predicted.gpu_peak},
        "predicted_host_bytes": {**decision.predicted.host, "peak": decision.predicted.host_peak},
        "predicted_steps": {
            mode: {"seconds": c.seconds, "tokens_per_s": c.tokens_per_s, "mfu": c.mfu, "parts": dict(c.parts)}
            for mode, c in plan.steps.items()
        },
        "launch": " ".join(line.rstrip("\\").strip() for line in launch(plan, model)) if plan.decision else None,
        "rates": dict(request.device.sources),
    }
