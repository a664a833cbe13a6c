"""Helpers around an Engine: a listener that collects events, tiny random checkpoints, transformers' own answers."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Event, Failed, Preempted, Request, SamplingParams, Started, Token

TINY = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=131,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


# Ways to sample, one of each kind that the sampler treats apart.
KINDS = {
    "plain": dict(),
    "truncated": dict(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01),
    "penalised": dict(temperature=1.2, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
    "biased": dict(temperature=2.0, logit_bias={5: 4.0, 6: -50.0}, min_tokens=5, logprobs=3),
}


@dataclass
class Listener:
    """Collects what an engine reports; `wait` returns once every named sequence has ended."""

    outputs: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    tokens: list[Token] = field(default_factory=list)
    finished: set[tuple[str, int]] = field(default_factory=set)
    failed: dict[str, Failed] = field(default_factory=dict)
    started: dict[str, int] = field(default_factory=dict)
    preempted: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, events: list[Event]) -> None:
        with self.changed:
            for event in events:
                if isinstance(event, Token):
                    key = (event.request_id, event.sequence_index)
                    self.outputs.setdefault(key, []).append(event.token_id)
                    self.tokens.append(event)
                    if event.finish is not None:
                        self.finished.add(key)
                elif isinstance(event, Started):
                    self.started[event.request_id] = event.num_cached_tokens
                elif isinstance(event, Failed):
                    self.failed[event.request_id] = event
                elif isinstance(event, Preempted):
                    self.preempted.append(event.request_id)
            self.changed.notify_all()

    def until(self, true: Callable[[], bool], timeout: float = 60) -> None:
        with self.changed:
            assert self.changed.wait_for(true, timeout), f"timed out: {self.finished} finished, {self.failed} failed"

    def wait(self, *requests: Request, timeout: float = 60) -> None:
        keys = {(r.id, i) for r in requests for i in range(r.sampling.num_sequences)}
        names = {r.id for r in requests}
        self.until(lambda: keys <= self.finished or bool(names & set(self.failed)), timeout)
        assert not names & set(self.failed), self.failed


def make_engine(model: Path, listener: Callable, **config) -> Engine:
    defaults = dict(num_blocks=128, max_num_batched_tokens=64, num_threads=1, device="cpu")
    return Engine(EngineConfig(str(model), **{**defaults, **config}), listener)


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def sampled(name: str, ids: list[int], seed: int = 1, max_tokens: int = 20, **params) -> Request:
    return Request(
        name, tuple(ids), len(ids), SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True, **params)
    )


def greedy(name: str, ids: Sequence[int], max_tokens: int = 16, **more) -> Request:
    return Request(name, tuple(ids), len(ids), SamplingParams(temperature=0, max_tokens=max_tokens), **more)


def run(model: Path, requests: Sequence[Request], **config) -> Listener:
    """All requests at once through a fresh engine; afterwards every counter is back at zero."""
    listener = Listener()
    with make_engine(model, listener, **config) as engine:
        for request in requests:
            engine.submit(request)
        listener.wait(*requests)
        assert_idle(engine)
    return listener


def assert_idle(engine: Engine) -> None:
    for _ in range(2):  # counters are published after the commands, so the second comes when those of the first are
        engine.check().result(10)
    stats = engine.stats()
    assert stats.free_blocks == stats.total_blocks, stats
    assert not (stats.num_requests or stats.num_running or stats.num_waiting or stats.num_waiting_tokens), stats
    assert not (stats.reserved_blocks or stats.pinned_blocks), stats


def checkpoint(directory: Path, model_type: str, **config) -> Path:
    """A tiny random model with weights large enough that its answers differ, saved as safetensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    chosen = {k: v for k, v in {**TINY, **config}.items() if v is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **chosen))
    for parameter in model.parameters():
        parameter.data += 0.08 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def reference(
    model: Path, prompts: Sequence[Sequence[int]], max_tokens: int, attention: str = "eager"
) -> list[list[int]]:
    """transformers' own greedy answers in float32."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention).eval()
    answers = []
    for ids in prompts:
        prompt = torch.tensor([list(ids)])
        out = hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers
