"""Decoder layers of the common kind, recognised and rebuilt from few kernels; everything else stays as it is.

A layer qualifies when its modules' code is, callee for callee and constant for constant, that of a known body (most
modeling files copy Llama's or Gemma's), and when the rebuilt layer gives the original's output in float32. What it asks
of attention is not read from its code but recorded from a dummy step.

    original   norm, q, k, v, (q norm, k norm), rope, attention, o, +, norm, gate, up, act *, down, +
    fused      qkv, [norm + rope + KV write], attention, o, [+ norm], gate_up, [act *], down, [+ next layer's norm]
"""

import copy
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine import ops
from engine.ops import Norm
from engine.paged_attention import Call

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of the layer's own contribution, in float32
ROUNDED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # the same, by the kernels in this dtype


@dataclass(slots=True)
class FuseReport:
    num_layers: int
    num_fused: int = 0
    final_norm: bool = False
    whole: bool = False  # what lies around the layers too
    reasons: dict[str, list[int]] = field(default_factory=dict)  # why not -> layers

    def __str__(self) -> str:
        text = f"{self.num_fused} of {self.num_layers} layers fused"
        text += ", embedding to logits in one go" if self.whole else ", final norm included" if self.final_norm else ""
        return text + "".join(f"; {why}: layers {layers}" for why, layers in self.reasons.items())


MLP_ROWS = 8192  # 8192 tokens by 2048 at a time take 3% longer, and 0.35 GiB less


class NotFusable(Exception):
    """Why a layer stays as it is."""


@dataclass(slots=True)
class Carry:
    """What a layer's last kernel has prepared for the module that runs next."""

    normed: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        normed, self.normed = self.normed, None
        return normed


class FusedLayer:
    """Stands in for a decoder layer's forward. The layer keeps its parameters, as views of the packed ones."""

    def __init__(self, layer: Any, call: Call):
        attention, mlp = layer.self_attn, layer.mlp
        body = _body(layer)
        self.call = call
        self.dim = attention.head_dim
        self.pre_attention = _norm(layer.input_layernorm)
        if body == "sandwich":
            self.post_attention: Norm | None = _norm(layer.post_attention_layernorm)
            self.pre_mlp = _norm(layer.pre_feedforward_layernorm)
            self.post_mlp: Norm | None = _norm(layer.post_feedforward_layernorm)
        else:
            self.post_attention = self.post_mlp = None
            self.pre_mlp = _norm(layer.post_attention_layernorm)
        self.head_norms = (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        self.activation = _activation(mlp.act_fn)
        self.qkv = _pack(attention.q_proj, attention.k_proj, attention.v_proj)
        self.num_heads = attention.q_proj.out_features // self.dim
        self.num_kv_heads = attention.k_proj.out_features // self.dim
        self.gate_up = _pack(mlp.gate_proj, mlp.up_proj)
        self.o, self.down = attention.o_proj, mlp.down_proj
        self.carry = Carry()
        self.next_norm: Norm | None = None  # of the next layer, or the final one

    def __call__(
        self, hidden_states: torch.Tensor, position_embeddings, pdserve_batch, last: torch.Tensor | None = None, **other
    ) -> torch.Tensor:
        """[1, num_tokens, hidden], updated in place: it is the residual stream and nobody else keeps it.

        `last`: which tokens' output is wanted, where nothing but their logits and everyone's KV is (the last layer).
        """
        batch = pdserve_batch
        residual = hidden_states[0]
        normed = self.carry.take()
        if normed is None:
            normed = ops.add_norm(residual, None, self.pre_attention)
        cos, sin = position_embeddings[0][0], position_embeddings[1][0]
        slots = batch.tensors.slots
        if last is not None:
            self._write_kv(normed, cos, sin, batch)
            normed, residual, cos, sin = normed[last], residual[last], cos[last], sin[last]
            slots = slots.new_full(last.shape, -1)
        qkv = F.linear(normed, *self.qkv)
        del normed  # each of these is as large as the residual stream, which bounds the KV pool
        ops.rope_write(qkv, cos, sin, self.head_norms, batch.cache, self.call.layer, slots)
        heads = qkv.view(qkv.shape[0], -1, self.dim)
        middle, end = self.num_heads, self.num_heads + self.num_kv_heads
        if last is not None:
            attended = batch.attend_last(heads[:, :middle], self.call)
        else:
            attended = batch.attend_written(heads[:, :middle], heads[:, middle:end], heads[:, end:], self.call)
        del qkv, heads
        x = F.linear(attended.reshape(attended.shape[0], -1), self.o.weight, self.o.bias)
        del attended
        normed = ops.add_norm(x, residual, self.pre_mlp, self.post_attention)
        del x
        x = self._mlp(normed)
        if self.next_norm is not None:
            self.carry.normed = ops.add_norm(x, residual, self.next_norm, self.post_mlp)
        else:
            residual += x if self.post_mlp is None else ops.add_norm(x, None, self.post_mlp)
        return hidden_states

    def _write_kv(self, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Any) -> None:
        """Of all tokens, without their queries."""
        weight, bias = self.qkv
        start = self.num_heads * self.dim
        kv = F.linear(normed, weight[start:], None if bias is None else bias[start:])
        ops.rope_write(kv, cos, sin, self.head_norms, batch.cache, self.call.layer, batch.tensors.slots)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        """A slice of a long chunk at a time, in place: its activations are several times as wide as all others."""
        if x.shape[0] <= MLP_ROWS:
            return F.linear(ops.gated(F.linear(x, *self.gate_up), self.activation), self.down.weight, self.down.bias)
        for part in x.split(MLP_ROWS):
            hidden = ops.gated(F.linear(part, *self.gate_up), self.activation)
            torch.mm(hidden, self.down.weight.t(), out=part)
            if self.down.bias is not None:
                part += self.down.bias
        return x


class FusedModel:
    """What lies around the layers, without the outer modules' bookkeeping: that takes as long as several kernels."""

    def __init__(self, module: Any, layers: list[FusedLayer], carry: Carry):
        body = module.base_model
        self.embed, self.rotary, self.layers, self.carry = body.embed_tokens, body.rotary_emb, layers, carry
        self.head = module.get_output_embeddings()
        self.softcap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)

    def __call__(self, batch: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """[num_rows, vocab_size], of each row's last token; in `out` if given."""
        x = self.embed(batch.input_ids)
        angles = self.rotary(x, batch.positions)
        for layer in self.layers[:-1]:
            x = layer(x, angles, batch)
        self.layers[-1](x, angles, batch, last=None if batch.is_decode else batch.last.long())
        rows = self.carry.take()
        assert rows is not None, "the last layer prepares the final norm"
        logits = F.linear(rows, self.head.weight, self.head.bias) if out is None else out
        if out is not None:
            torch.mm(rows, self.head.weight.t(), out=out)
            if self.head.bias is not None:
                logits += self.head.bias
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def fuse(model: Any, record: Callable[[], tuple[dict[int, Call], dict[int, dict]]], verify: Callable) -> FuseReport:
    """Rebuilds the layers that qualify, in place.

    record() runs the untouched model once: per layer, its attention's Call and the keyword arguments it was given.
    verify(original, fused, real, call, kwargs) returns the relative errors of a float32 copy and of the real thing.
    """
    layers = _layers(model.module)
    report = FuseReport(len(layers))
    if not layers:
        report.reasons["no list of decoder layers was found"] = []
        return report
    calls, inputs = record()
    checked: dict[tuple, str | None] = {}
    fused: dict[int, FusedLayer] = {}
    for i, layer in enumerate(layers):
        try:
            _check(layer, calls.get(i))
            call = calls[i]
            kind = (type(layer), call.window, call.scale, call.softcap, call.sinks is None)
            if kind not in checked:
                checked[kind] = _verified(layer, call, inputs[i], verify)
            if checked[kind] is not None:
                raise NotFusable(checked[kind])
            fused[i] = FusedLayer(layer, call)
        except NotFusable as why:
            report.reasons.setdefault(str(why), []).append(i)
    carry = _install(model.module, layers, fused, report)
    if report.final_norm and report.num_fused == len(layers):
        model.fused = FusedModel(model.module, [fused[i] for i in range(len(layers))], carry)
    return report


def _install(module: Any, layers: list[Any], fused: dict[int, FusedLayer], report: FuseReport) -> Carry:
    carry = Carry()
    for i, one in fused.items():
        one.carry = carry
        if i + 1 in fused:
            one.next_norm = fused[i + 1].pre_attention
        layers[i].forward = one  # type: ignore[assignment]
    report.num_fused = len(fused)
    final = getattr(module.base_model, "norm", None)
    if final is not None and len(layers) - 1 in fused:
        try:
            norm = _norm(final)
        except NotFusable:
            return carry
        fused[len(layers) - 1].next_norm = norm

        def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
            normed = carry.take()
            return ops.add_norm(hidden_states[0], None, norm)[None] if normed is None else normed[None]

        final.forward = MethodType(forward, final)  # type: ignore[method-assign]
        report.final_norm = True
    return carry


def _verified(layer: Any, call: Call, kwargs: dict, verify: Callable) -> str | None:
    """Why not."""
    original, rebuilt, real = (copy.deepcopy(layer) for _ in range(3))
    error, rounded = verify(original.float(), FusedLayer(rebuilt.float(), call), FusedLayer(real, call), call, kwargs)
    dtype = layer.input_layernorm.weight.dtype
    if not error <= TOLERANCE:
        return f"{type(layer).__name__} fused is off by {error:.2g}"
    if not rounded <= ROUNDED[dtype]:
        return f"{type(layer).__name__} by our kernels in {dtype} is off by {rounded:.2g}"
    return None


# ---------------------------------------------------------------- recognition


def _layers(module: Any) -> list[Any]:
    layers = getattr(module.base_model, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def _check(layer: Any, call: Call | None) -> None:
    if call is None or _body(layer) is None:
        raise NotFusable(f"{type(layer).__name__} is not a known body")
    attention, mlp = layer.self_attn, layer.mlp
    if not any(_same(type(attention).forward, body) for body in _attentions()):
        raise NotFusable(f"{type(attention).__name__} is not a known attention")
    from transformers.models.llama.modeling_llama import LlamaMLP

    if not _same(type(mlp).forward, LlamaMLP.forward):
        raise NotFusable(f"{type(mlp).__name__} is not a known MLP")
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    for linear in [*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj]:
        if type(linear) is not nn.Linear:
            raise NotFusable(f"{type(linear).__name__} is not a plain linear layer")
    if not attention.k_proj.out_features == attention.v_proj.out_features or attention.head_dim % 2:
        raise NotFusable("K and V differ in width")
    _activation(mlp.act_fn)


def _body(layer: Any) -> str | None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    if not all(hasattr(layer, name) for name in ("self_attn", "mlp", "input_layernorm")):
        return None
    if _same(type(layer).forward, LlamaDecoderLayer.forward):
        return "plain"
    return "sandwich" if _same(type(layer).forward, Gemma2DecoderLayer.forward) else None


def _attentions() -> list[Callable]:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.mistral.modeling_mistral import MistralAttention
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    known = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention, Gemma2Attention, Gemma3Attention)
    return [attention.forward for attention in known]


def _norm(module: Any) -> Norm:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    forward = type(module).forward
    if _same(forward, LlamaRMSNorm.forward):
        return Norm(module.weight, module.variance_epsilon)
    if _same(forward, Gemma2RMSNorm.forward) and _same(type(module)._norm, Gemma2RMSNorm._norm):
        return Norm(module.weight, module.eps, 1.0)
    raise NotFusable(f"{type(module).__name__} is not a known norm")


def _activation(act: Callable) -> str:
    """Told from its values: activations come as functions, modules and partials of many names."""
    x = torch.linspace(-6, 6, 97)
    known = {"silu": F.silu(x), "gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
    y = act(x)
    for name, value in known.items():
        if torch.allclose(y, value, rtol=1e-6, atol=1e-6):
            return name
    raise NotFusable(f"activation {act} is not a known one")


def _same(f: Any, g: Any, depth: int = 4) -> bool:
    """The same code in whatever file: instructions, names, constants, and whatever functions it calls by name."""
    f, g = inspect.unwrap(f), inspect.unwrap(g)
    if f is g:
        return True
    if not (isinstance(f, FunctionType) and isinstance(g, FunctionType)) or not depth:
        return False
    a, b = f.__code__, g.__code__
    if (a.co_code, a.co_names, a.co_varnames) != (b.co_code, b.co_names, b.co_varnames):
        return False

    def constants(code) -> list:
        return [c for c in code.co_consts if not isinstance(c, str)]

    if constants(a) != constants(b):
        return False
    for name in a.co_names:
        x, y = f.__globals__.get(name), g.__globals__.get(name)
        # the fallback of the attention interface, which is never called with ours
        if name != "eager_attention_forward" and isinstance(x, FunctionType) and not _same(x, y, depth - 1):
            return False
    return True


def _pack(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight and bias for several layers of the same input; theirs become views of it."""
    with torch.no_grad():
        weight = torch.cat([linear.weight.data for linear in linears])
        biases = [linear.bias.data for linear in linears if linear.bias is not None]
        if len(biases) not in (0, len(linears)):
            raise NotFusable("some of the packed layers have a bias and some have none")
        bias = torch.cat(biases) if biases else None
        start = 0
        for linear in linears:
            stop = start + linear.out_features
            linear.weight = nn.Parameter(weight[start:stop], requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias[start:stop], requires_grad=False)
            start = stop
    return weight, bias
