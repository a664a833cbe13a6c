"""Mixtures of experts in steps that a CUDA graph must be able to capture. Registered as "pdserve" with transformers.

Its own grouped products never look at the routing from the host in bfloat16. In other types torch's fall back to a
loop that does, which no graph can hold: while one is captured every expert then computes every token, and those that
were not chosen count zero. That is for float32 checks and small models; other steps stay with the grouped products.
"""

import torch

NAME = "pdserve"


def use_capturable_experts(model: torch.nn.Module) -> bool:
    """Whether `model` has experts that could be told to use ours."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward  # noqa: F401
    except ImportError:
        return False
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
    if getattr(model.config, "_experts_implementation", None) != "grouped_mm":
        return False
    model.set_experts_implementation(NAME)  # type: ignore[operator]
    return True


def experts(
    self: torch.nn.Module,  # a module of expert weights that transformers' decorator has marked
    hidden_states: torch.Tensor,  # [num_tokens, hidden]
    top_k_index: torch.Tensor,  # [num_tokens, top_k]
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """[num_tokens, hidden]."""
    if hidden_states.dtype != torch.bfloat16 and torch.cuda.is_current_stream_capturing():
        return every_expert(self, hidden_states, top_k_index, top_k_weights)
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def every_expert(
    self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        """[num_experts, num_tokens, out]."""
        weight = getattr(self, name)
        y = torch.matmul(x, weight if self.is_transposed else weight.transpose(-2, -1))
        return y + getattr(self, f"{name}_bias")[:, None] if self.has_bias else y

    inner = product(hidden_states, "gate_up_proj" if self.has_gate else "up_proj")
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outer = product(inner, "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        outer = self.post_expert_norm(outer)
    shares = hidden_states.new_zeros(hidden_states.shape[0], outer.shape[0])
    shares.scatter_(1, top_k_index, top_k_weights.to(shares.dtype))
    return torch.einsum("eth,te->th", outer, shares)
