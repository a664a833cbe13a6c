"""The models that benchmarks/engine_cuda.py measures, as configurations, and what their steps cost by definition."""

from dataclasses import dataclass
from typing import Any

ROPE = dict(rope_type="default", rope_theta=500000.0)
COMMON = dict(
    max_position_embeddings=65536, tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2
)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters=ROPE,
        rms_norm_eps=1e-5,
    ),
    "toy": dict(  # runs on a CPU too
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=ROPE,
        rms_norm_eps=1e-5,
    ),
    "qwen3-8b": dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters=ROPE,
        rms_norm_eps=1e-6,
    ),
    "mistral-7b": dict(
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=4096,
        rope_parameters=ROPE,
        rms_norm_eps=1e-5,
    ),
    "gemma2-9b": dict(
        architectures=["Gemma2ForCausalLM"],
        model_type="gemma2",
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        sliding_window=4096,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        hidden_activation="gelu_pytorch_tanh",
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
}
LONG, PROMPT = 32768, 512  # tokens of the long row of a skewed batch; of the prompt of a mixed step


@dataclass(frozen=True, slots=True)
class Point:
    """decode, sampled: rows of `length` tokens; skewed: the first of LONG; mixed: a prompt too; prefill: prompts."""

    kind: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch}x{self.length}"

    @classmethod
    def parse(cls, kind: str, text: str) -> "Point":
        batch, length = text.split("x")
        return cls(kind, int(batch), int(length))

    @property
    def num_tokens(self) -> int:
        """Whose KV the point needs, roughly."""
        return self.batch * (self.length + 200) + LONG * (self.kind == "skewed")


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations and bytes read that a point cannot do without. `skipped`: operations of the last layer's output for
    tokens whose logits nobody wants, which an engine may leave out; they are in `operations`."""

    operations: float
    size_bytes: float
    skipped: float = 0.0


class Shape:
    def __init__(self, name: str):
        self.config: dict[str, Any] = COMMON | SHAPES[name]
        c = self.config
        self.hidden, self.wide, self.layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
        self.dim = c.get("head_dim") or self.hidden // c["num_attention_heads"]
        self.num_heads, self.num_kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.heads, self.kv_heads = self.num_heads * self.dim, self.num_kv_heads * self.dim
        self.vocab_size, self.window = c["vocab_size"], c.get("sliding_window") or 10**9
        # the share of layers that keep to the window
        self.windowed = {"gemma2": 0.5, "mistral": 1.0}.get(c["model_type"], 0.0)

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each product of a layer, as one engine packs them."""
        return {
            "qkv": (self.heads + 2 * self.kv_heads, self.hidden),
            "o": (self.hidden, self.heads),
            "gate_up": (2 * self.wide, self.hidden),
            "down": (self.hidden, self.wide),
        }

    @property
    def body(self) -> int:
        return self.layers * sum(a * b for a, b in self.products.values())

    @property
    def head(self) -> int:
        return self.vocab_size * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Per token."""
        return self.layers * 4 * self.kv_heads

    def cost(self, point: Point) -> Cost:
        batch, length = point.batch, point.length
        if point.kind == "prefill":
            seen = length**2 / 2
            if length > self.window:
                seen -= self.windowed * (length - self.window) ** 2 / 2
            attention = batch * self.layers * 4.0 * seen * self.heads
            tokens = batch * length
            tail = tokens * 2.0 * (self.hidden * self.heads + 3 * self.hidden * self.wide) + attention / self.layers
            return Cost(2.0 * self.body * tokens + 2.0 * self.head * batch + attention, 2.0 * self.body, tail)
        read = min(length, self.window) * self.windowed + length * (1 - self.windowed)
        tokens = batch * read + (LONG - length) * (point.kind == "skewed")
        rows = batch + PROMPT * (point.kind == "mixed")
        operations = 2.0 * self.body * rows + 2.0 * self.head * batch + tokens * self.layers * 4.0 * self.heads
        return Cost(operations, 2.0 * (self.body + self.head) + tokens * self.kv_bytes)
