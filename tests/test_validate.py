"""The validator: each field at, inside and outside its range; refusals name field, value and what is allowed."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from router.config import Limits, RouterConfig
from router.errors import InvalidRequest, RequestError, to_status
from router.model import Model
from router.validate import Accepted, accept, parse

VOCAB = 1000
MAX_LEN = 64
LIMITS = Limits(max_num_sequences=4, max_logprobs=5, max_stop_strings=2, max_stop_token_ids=3, max_logit_bias_entries=2)
MODEL = Model(
    name="m",
    root="/m",
    vocab_size=VOCAB,
    max_model_len=MAX_LEN,
    eos_token_ids=(2,),
    architectures=("LlamaForCausalLM",),
    dtype="float32",
    defaults=pb.SamplingParams(
        temperature=0.6, top_p=0.9, top_k=0, min_p=0, presence_penalty=0, frequency_penalty=0,
        repetition_penalty=1.1, num_sequences=1,
    ),
)  # fmt: skip


def check(request: pb.GenerateRequest) -> Accepted:
    return accept(parse(request, MODEL, LIMITS), list(request.token_ids.ids) or [1], MODEL, MAX_LEN)


def ask(num_prompt_tokens: int = 4, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * num_prompt_tokens), **fields)


def refusal(request: pb.GenerateRequest) -> RequestError:
    with pytest.raises(RequestError) as caught:
        check(request)
    return caught.value


def sampling(**fields: Any) -> pb.GenerateRequest:
    return ask(sampling=pb.SamplingParams(**fields))


def stopping(**fields: Any) -> pb.GenerateRequest:
    return ask(stopping=pb.StoppingCriteria(**fields))


NEGATIVE = 2**32 - 1  # what -1 on the wire decodes to in a uint32
BAD_FLOATS = [math.nan, math.inf, -math.inf, -1e30, 1e30]


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("temperature", [-0.1, 2.1, *BAD_FLOATS], [0, 1, 2]),
        ("top_p", [0, -0.5, 1.1, *BAD_FLOATS], [1e-6, 0.5, 1]),
        ("min_p", [-0.1, 1.1, *BAD_FLOATS], [0, 1]),
        ("presence_penalty", [-2.1, 2.1, *BAD_FLOATS], [-2, 2]),
        ("frequency_penalty", [-2.1, 2.1, *BAD_FLOATS], [-2, 2]),
        ("repetition_penalty", [0, -1, 10.1, *BAD_FLOATS], [0.1, 10]),
        ("top_k", [-2, -(2**31)], [-1, 0, 1, 2**31 - 1]),
        ("num_sequences", [0, 5, NEGATIVE], [1, 4]),
    ],
)
def test_sampling_ranges(field: str, bad: list[float], good: list[float]) -> None:
    for value in bad:
        error = refusal(sampling(**{field: value}))
        assert isinstance(error, InvalidRequest) and error.field == f"sampling.{field}"
        assert error.reason == pb.ERROR_REASON_INVALID_PARAMETER
        shown = "inf" if value == math.inf else "4294967295" if value == NEGATIVE else f"{value:.6g}"
        assert f"is {shown}; allowed is" in error.message or abs(value) > 1e9
    for value in good:
        check(sampling(**{field: value}))


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (stopping(max_tokens=0), "stopping.max_tokens", "is 0; at least 1"),
        (stopping(max_tokens=61), "stopping.max_tokens", r"is 61; allowed is \[1, 60\] \(max_model_len 64"),
        (stopping(max_tokens=NEGATIVE), "stopping.max_tokens", r"is 4294967295; allowed is \[1, 60\]"),
        (stopping(max_tokens=5, min_tokens=6), "stopping.min_tokens", r"is 6; allowed is \[0, 5\]"),
        (stopping(stop=["a", "b", "c"]), "stopping.stop", "has 3 strings; at most 2"),
        (stopping(stop=["a", ""]), r"stopping.stop[1]", r"has 0 bytes; allowed is \[1, 256\]"),
        (stopping(stop=["é" * 129]), r"stopping.stop[0]", "has 258 bytes"),
        (stopping(stop_token_ids=[1, 2, 3, 4]), "stopping.stop_token_ids", "has 4 ids; at most 3"),
        (stopping(stop_token_ids=[1, VOCAB]), r"stopping.stop_token_ids[1]", r"is 1000; allowed is \[0, 999\]"),
        (sampling(logit_bias={VOCAB: 1.0}), f"sampling.logit_bias[{VOCAB}]", r"token id 1000; allowed is \[0, 999\]"),
        (sampling(logit_bias={1: 100.5}), "sampling.logit_bias[1]", r"is 100.5; allowed is \[-100, 100\]"),
        (sampling(logit_bias={1: math.nan}), "sampling.logit_bias[1]", "is nan"),
        (sampling(logit_bias={1: 0, 2: 0, 3: 0}), "sampling.logit_bias", "has 3 entries; at most 2"),
        (ask(response=pb.ResponseOptions(logprobs=6)), "response.logprobs", r"is 6; allowed is \[0, 5\]"),
        (ask(request_id="a b"), "request_id", "is 'a b'; allowed is"),
        (ask(request_id="x" * 129), "request_id", "allowed is"),
        (ask(request_id="x\n"), "request_id", "allowed is"),
        (ask(cache=pb.CacheOptions(cache_salt="ü")), "cache.cache_salt", "allowed is"),
        (ask(priority=1001), "priority", r"is 1001; allowed is \[-1000, 1000\]"),
        (ask(priority=-(2**31)), "priority", "is -2147483648"),
        (ask(session_id="é" * 129), "session_id", "has 258 bytes; at most 256"),
        (pb.GenerateRequest(), "prompt", "is missing; set one of text, token_ids, chat"),
        (pb.GenerateRequest(text=""), "text", "the prompt is empty"),
        (pb.GenerateRequest(chat=pb.ChatPrompt()), "chat.messages", "is empty"),
        (
            pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="a b", content="x")])),
            "chat.messages[0].role",
            "is 'a b'; allowed is",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, VOCAB + 7])),
            "token_ids.ids[1]",
            r"is 1007; allowed is \[0, 999\] \(the vocabulary has 1000 tokens\)",
        ),
    ],
)
def test_refusals_name_field_value_and_range(request_: pb.GenerateRequest, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check(request_)
    assert caught.value.field == field
    assert field in caught.value.message


def test_prompt_length_bounds() -> None:
    assert check(ask(MAX_LEN - 1)).stopping.max_tokens == 1
    for length in (MAX_LEN, MAX_LEN + 1):
        error = refusal(ask(length))
        assert error.reason == pb.ERROR_REASON_PROMPT_TOO_LONG
        assert f"has {length} tokens; allowed is [1, 63]" in error.message
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        accept(parse(pb.GenerateRequest(text="x"), MODEL, LIMITS), [], MODEL, MAX_LEN)


def test_unknown_model() -> None:
    assert refusal(ask(model="other")).reason == pb.ERROR_REASON_MODEL_NOT_FOUND
    check(ask(model="m"))


def test_unset_fields_come_from_the_model() -> None:
    accepted = check(ask())
    assert accepted.sampling.temperature == pytest.approx(0.6)
    assert accepted.sampling.repetition_penalty == pytest.approx(1.1)
    assert accepted.stopping.max_tokens == 60 and accepted.stopping.HasField("min_tokens")
    assert accepted.sampling.HasField("seed") and accepted.request_id.startswith("gen-")
    assert check(ask()).sampling.seed != accepted.sampling.seed
    assert all(accepted.sampling.HasField(f.name) for f in accepted.sampling.DESCRIPTOR.fields if f.has_presence)


def test_zero_keeps_its_meaning() -> None:
    accepted = check(sampling(temperature=0, seed=0))
    assert accepted.sampling.temperature == 0 and accepted.sampling.seed == 0
    assert accepted.logprobs is None
    assert check(ask(response=pb.ResponseOptions(logprobs=0))).logprobs == 0
    assert check(sampling(temperature=1e-9)).sampling.temperature == 0
    assert check(sampling(top_k=-1)).sampling.top_k == 0


def test_long_values_do_not_fill_the_message() -> None:
    error = refusal(ask(request_id="x" * 1_000_000))
    assert len(error.message) < 300
    assert sum(len(value) for _, value in to_status(error).trailing_metadata) < 1000


ANY_U32 = st.sampled_from([0, 1, 2, 63, 64, VOCAB, 2**31, 2**32 - 1])
ANY_FLOAT = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, 2.0]))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_is_accepted_is_in_range(data: st.DataObject) -> None:
    floats = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    request = pb.GenerateRequest(
        request_id=data.draw(st.text(max_size=4)),
        token_ids=pb.TokenIds(ids=data.draw(st.lists(ANY_U32, max_size=3))),
        sampling=pb.SamplingParams(
            top_k=data.draw(st.integers(-(2**31), 2**31 - 1)),
            num_sequences=data.draw(ANY_U32),
            seed=data.draw(st.integers(0, 2**64 - 1)),
            logit_bias=data.draw(st.dictionaries(ANY_U32, ANY_FLOAT, max_size=3)),
            **{name: data.draw(ANY_FLOAT) for name in data.draw(st.sets(st.sampled_from(floats)))},
        ),
        stopping=pb.StoppingCriteria(
            max_tokens=data.draw(ANY_U32),
            min_tokens=data.draw(ANY_U32),
            stop=data.draw(st.lists(st.text(max_size=300), max_size=3)),
            stop_token_ids=data.draw(st.lists(ANY_U32, max_size=4)),
        ),
        response=pb.ResponseOptions(logprobs=data.draw(ANY_U32)),
        priority=data.draw(st.integers(-(2**31), 2**31 - 1)),
        session_id=data.draw(st.text(max_size=300)),
    )
    try:
        accepted = accept(parse(request, MODEL, LIMITS), list(request.token_ids.ids), MODEL, MAX_LEN)
    except RequestError as error:
        assert error.message and to_status(error).code == error.code
        return
    s, stop = accepted.sampling, accepted.stopping
    assert 0 <= s.temperature <= 2 and 0 < s.top_p <= 1 and 0 <= s.min_p <= 1 and 0 < s.repetition_penalty <= 10
    assert abs(s.presence_penalty) <= 2 and abs(s.frequency_penalty) <= 2 and 0 <= s.top_k < VOCAB
    assert 1 <= s.num_sequences <= 4 and all(i < VOCAB and abs(b) <= 100 for i, b in s.logit_bias.items())
    assert 1 <= stop.max_tokens <= MAX_LEN - len(accepted.token_ids) and stop.min_tokens <= stop.max_tokens
    assert 1 <= len(accepted.token_ids) < MAX_LEN and max(accepted.token_ids) < VOCAB


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"served_model_name": ""}, "served_model_name is empty"),
        ({"port": 70000}, r"port is 70000; allowed is \[0, 65535\]"),
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"progress_s": math.nan}, "progress_s is nan"),
        ({"max_run_s": "1"}, "max_run_s is '1'"),
    ],
)
def test_config_is_checked(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RouterConfig(**{"served_model_name": "m", **fields})


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_num_sequences is 0"):
        Limits(max_num_sequences=0)
