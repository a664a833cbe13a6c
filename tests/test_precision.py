"""bfloat16 and float16 through the whole engine: every logit near float32's, in chunks, over prefixes, in decode."""

from pathlib import Path

import pytest
import torch

from engine.request import Request, SamplingParams
from tests.engines import TINY, Listener, checkpoint, prompt, run
from tests.test_families import FAMILIES

# Of a row's spread of logits. Rounding is 2**-8 and 2**-11 of a value; four layers add up several.
TOLERANCE = {"bfloat16": 0.035, "float16": 0.0045}
VOCAB = TINY["vocab_size"]
# Rounding makes a router choose another one now and then, and that logit is anywhere.
NO_EXPERTS = {name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3")}
NO_EXPERTS["deepseek_v3"] = {**FAMILIES["deepseek_v3"], "first_k_dense_replace": 4}


def requests() -> list[Request]:
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=VOCAB)
    prompts = [prompt(70, 1), prompt(70, 1)[:50] + prompt(9, 2), prompt(3, 3), prompt(41, 4), prompt(17, 5)]
    return [Request(str(i), tuple(ids), len(ids), sampling) for i, ids in enumerate(prompts)]


def rows(listener: Listener) -> dict[tuple[str, int], tuple[int, torch.Tensor]]:
    """By request and output position: the token, and the log-probability of each in the vocabulary."""
    found = {}
    for token in listener.tokens:
        assert token.logprob is not None
        every = torch.empty(VOCAB)
        for one in token.logprob.top:
            every[one.token_id] = one.logprob
        found[token.request_id, token.offset] = token.token_id, every
    return found


@pytest.mark.parametrize("paged", [False, True], ids=["reference", "paged"])
@pytest.mark.parametrize("family", NO_EXPERTS)
def test_logits_are_near_those_in_float32(family: str, paged: bool, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, family, **NO_EXPERTS[family])
    options = dict(max_num_batched_tokens=33, max_num_seqs=5, block_size=16, paged=paged)
    exact = rows(run(model, requests(), **options))
    for dtype, tolerance in TOLERANCE.items():
        found = rows(run(model, requests(), **options, dtype=dtype))
        worst, compared = 0.0, 0
        for request in requests():
            for offset in range(12):
                token, expected = exact[request.id, offset]
                other, logprobs = found[request.id, offset]
                spread = (expected.max() - expected.min()).item()
                worst = max(worst, ((logprobs - expected).abs().max() / spread).item())
                compared += 1
                if other != token:
                    break  # a near-tie went the other way: from here on the contexts differ
        assert worst <= tolerance, f"{dtype}: {worst:.4f} of the spread"
        assert compared >= 30, "too few answers agree for long enough"
