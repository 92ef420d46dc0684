"""The sizes of a model that its memory depends on, read off its configuration."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from easyctx.memory.matrices import MLP, Adapters, Matrix


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of a causal LM. Per layer they are those of its largest one; parameters are summed over all layers.

    norms: how many RMS norms of the residual stream's width a layer has; head_norms: whether queries and keys have
    one too.
    experts, active_experts: of a layer's MLP (1 and 1 for a dense one).
    layer_parameters: of all layers together; largest_layer: of the largest; outer_parameters: of embedding, head and
    final norm, a tied matrix counted once.
    dense_layers: of a mixture, the layers whose MLP is a dense one all the same; dense_intermediate: its width;
    dense_layer: parameters of such a layer.
    matrices: linear modules of a layer, without those of a mixture's experts.
    adapters: LoRA beside some of these, all else frozen; parameters are counted without.
    fused: whether norms and the MLP's activation are one kernel each (Liger), which keep their inputs alone.
    clamped: whether the MLP's activation is gpt-oss's, which Liger leaves as it is.
    """

    num_layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norms: int
    head_norms: bool
    experts: int
    active_experts: int
    layer_parameters: int
    largest_layer: int
    outer_parameters: int
    dense_layers: tuple[int, ...] = ()
    dense_intermediate: int = 0
    dense_layer: int = 0
    matrices: tuple[Matrix, ...] = ()
    adapters: Adapters | None = None
    fused: bool = False
    clamped: bool = False

    def with_adapters(self, adapters: Adapters | None) -> "MemoryShape":
        return replace(self, adapters=adapters)

    @cached_property
    def kinds(self) -> tuple["MemoryShape", ...]:
        """For each kind of layer that there is, the sizes of a model whose layers are all of this kind."""
        return (_alike(self, dense=False), _alike(self, dense=True)) if self.dense_layers else (self,)

    def kind(self, index: int) -> int:
        """Which of `kinds` a layer is of."""
        return int(index in self.dense_layers)

    def of_layer(self, index: int) -> "MemoryShape":
        return self.kinds[self.kind(index)]

    @property
    def matrix_names(self) -> tuple[str, ...]:
        return tuple(matrix.name for matrix in self.matrices)

    @property
    def matrix_parameters(self) -> int:
        """Of the matrices of all layers."""
        return sum(m.parameters * m.layers for m in self.matrices)

    @property
    def targets(self) -> tuple[Matrix, ...]:
        """The matrices that have an adapter. Where some layers' MLP is a mixture, peft takes these names to mean the
        experts, and leaves the dense ones."""
        names = () if self.adapters is None else self.adapters.targets
        return tuple(m for m in self.matrices if m.name in names and not (self.is_mixture and m.name in MLP))

    @property
    def fused_mlp(self) -> bool:
        return self.fused and not self.clamped

    @property
    def trains_experts(self) -> bool:
        """Whether a mixture's experts have a gradient: their own, or one for the adapters that are added to them."""
        return self.is_mixture and (self.adapters is None or any(name in MLP for name in self.adapters.targets))

    def trained_among(self, names: Collection[str]) -> list[Matrix]:
        """Of the matrices so named, those that need their input for a gradient of weights: not frozen ones."""
        return [m for m in (self.matrices if self.adapters is None else self.targets) if m.name in names]

    @property
    def keeps_normed(self) -> bool:
        """Whether norms keep their result before the weight, for the weight's gradient."""
        return self.adapters is None or self.adapters.norms

    @property
    def trains_head(self) -> bool:
        """Whether the head has a gradient: beside adapters only where it is the embedding, and that is trained."""
        is_tied = self.outer_parameters < 2 * self.vocab * self.hidden
        return self.adapters is None or (self.adapters.embeddings and is_tied)

    @property
    def parameters(self) -> int:
        return self.layer_parameters + self.outer_parameters

    @property
    def is_mixture(self) -> bool:
        return self.experts > 1

    @property
    def q_width(self) -> int:
        """Values of one token's queries, and of its attention output."""
        return self.q_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Values of one token's keys and values."""
        return 2 * self.kv_heads * self.head_dim

    @classmethod
    def from_config(cls, config: Any, num_layers: int | None = None) -> "MemoryShape":
        """Of a transformers configuration (its text part), with `num_layers` in place of its own where given."""
        text = config.get_text_config(decoder=True)
        layers = num_layers or text.num_hidden_layers
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        family = text.model_type
        head_norms = family in ("qwen3", "qwen3_moe", "gemma3_text")
        norms = 4 if family in ("gemma2", "gemma3_text") else 2
        experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
        expert_width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        dense = _dense_layers(text, experts, layers)
        experts = 1 if len(dense) == layers else experts

        attention = _attention_parameters(text, heads, kv_heads, head_dim, head_norms)
        around = attention + norms * text.hidden_size
        of_dense = around + 3 * text.hidden_size * text.intermediate_size
        of_mixture = around + experts * (3 * expert_width + 1) * text.hidden_size
        if family == "gpt_oss":
            of_mixture += experts * (2 * expert_width + text.hidden_size + 1)  # biases, also of the router
        sizes = [of_dense if index in dense else of_mixture for index in range(layers)]
        matrices = 1 if getattr(text, "tie_word_embeddings", False) else 2
        return cls(
            num_layers=layers,
            hidden=text.hidden_size,
            q_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=expert_width if experts > 1 else text.intermediate_size,
            vocab=text.vocab_size,
            norms=norms,
            head_norms=head_norms,
            experts=experts,
            active_experts=getattr(text, "num_experts_per_tok", 1) if experts > 1 else 1,
            layer_parameters=sum(sizes),
            largest_layer=max(sizes),
            dense_layers=tuple(dense) if experts > 1 else (),
            dense_intermediate=text.intermediate_size,
            dense_layer=of_dense,
            outer_parameters=matrices * text.vocab_size * text.hidden_size + text.hidden_size,
            matrices=_linear_modules(text, heads * head_dim, kv_heads * head_dim, layers, len(dense)),
            clamped=family == "gpt_oss",
        )


def _alike(shape: MemoryShape, *, dense: bool) -> MemoryShape:
    """Of a mixture with dense layers among the others: the sizes if all layers were of one kind."""
    adapters, layers, few = shape.adapters, shape.num_layers, len(shape.dense_layers)
    of_mixture = (shape.layer_parameters - few * shape.dense_layer) // (layers - few)
    size = shape.dense_layer if dense else of_mixture
    matrices = tuple(replace(m, layers=layers) for m in shape.matrices if dense or m.name not in MLP)
    kind = replace(shape, dense_layers=(), layer_parameters=size * layers, largest_layer=size, matrices=matrices)
    if not dense:
        return kind
    if adapters is not None:
        adapters = replace(adapters, targets=tuple(m.name for m in shape.targets))
    return replace(kind, experts=1, active_experts=1, intermediate=shape.dense_intermediate, adapters=adapters)


def _dense_layers(text: Any, experts: int, layers: int) -> list[int]:
    """Those whose MLP is no mixture, as transformers' models with `mlp_only_layers` and `decoder_sparse_step` tell."""
    if experts == 1:
        return list(range(layers))
    named, step = getattr(text, "mlp_only_layers", None) or (), getattr(text, "decoder_sparse_step", None) or 1
    return [index for index in range(layers) if index in named or (index + 1) % step]


def _linear_modules(text: Any, q: int, kv: int, layers: int, dense: int) -> tuple[Matrix, ...]:
    """dense: how many layers have an MLP that is no mixture."""
    d, f = text.hidden_size, text.intermediate_size
    if text.model_type == "phi3":
        attention, mlp = [("qkv_proj", d, q + 2 * kv)], [("gate_up_proj", d, 2 * f)]
    else:
        attention = [("q_proj", d, q), ("k_proj", d, kv), ("v_proj", d, kv)]
        mlp = [("gate_proj", d, f), ("up_proj", d, f)]
    attention.append(("o_proj", q, d))
    mlp.append(("down_proj", f, d))
    of_mlp = [Matrix(*sizes, layers=dense) for sizes in mlp] if dense else []
    return *(Matrix(*sizes, layers=layers) for sizes in attention), *of_mlp


def _attention_parameters(text: Any, heads: int, kv_heads: int, head_dim: int, head_norms: bool) -> int:
    q, kv = heads * head_dim, 2 * kv_heads * head_dim
    parameters = (2 * q + kv) * text.hidden_size
    if text.model_type in ("qwen2", "gpt_oss") or getattr(text, "attention_bias", False):
        parameters += q + kv
        if text.model_type != "qwen2":
            parameters += text.hidden_size
    if text.model_type == "gpt_oss":
        parameters += heads  # sinks
    return parameters + (2 * head_dim if head_norms else 0)
