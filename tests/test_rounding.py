"""KV that a receiver keeps in float8 and its sender does not: it lands as what the receiver's engine would write."""

from pathlib import Path

import grpc
import pytest
import torch

from cluster.config import DeploymentConfig
from engine import fp8
from engine.kv_layout import FP8, KVLayout
from kv_transfer.choose import candidates
from kv_transfer.rounding import RoundedMemory, quantise
from tests.rounding import LAYERS, written
from tests.service import request, service
from tests.transfer import tokens, transfer_pair


def test_rounds_as_the_engine_for_every_value_of_16_bits():
    """Each beside 1, whose scale it shares or sets, and alone; NaN and infinities among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = every.view(dtype)
        for rows in (x[:, None], torch.stack([x, torch.ones_like(x)], 1), x.view(-1, 64)):
            for ours, theirs in zip(quantise(rows), fp8.quantise(rows), strict=True):
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("transport", ["local", "grpc"])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_the_receiver_gets_what_its_engine_would_have_written(dtype: str, sizes: tuple[int, int], transport: str):
    """From token 32 on, in stretches of blocks and layers; the prefix before it is there and stays as it is."""
    mine, theirs = [7, 2, 9, 0, 4, 11], [3, 8, 1, 10, 6, 5]
    source = written(dtype, None, sizes[0], mine, 90)
    wanted = written(dtype, FP8, sizes[1], theirs, 90)
    target = written(dtype, FP8, sizes[1], theirs, 32)
    count, first = -(-90 // sizes[0]), 32 // sizes[0]
    async with transfer_pair(transport, source=RoundedMemory.of(source), target=target) as pair:
        held = theirs[: -(-90 // sizes[1])]
        transfer_id = pair.receiver.grant(
            "owner", ("prefill-0", "incarnation-a"), held, 32 // sizes[1], 30, None, (sizes[0], 90)
        )
        outgoing = pair.open(transfer_id)
        for stretch in (range(first, first + 1), range(first + 1, count)):
            for layers in ((0, 2), (2, 3)):
                outgoing.push([mine[i] for i in stretch], stretch.start, *layers)
        await pair.receiver.commit(transfer_id, await outgoing.finish())
    assert torch.equal(tokens(target, held)[:90], tokens(wanted, held)[:90])
    assert pair.receiver.bytes_received == (count - first) * RoundedMemory.of(source).width(0, 3)


def test_who_can_be_rounded_for_whom():
    layouts = {
        (d, k): KVLayout.of("m", "w", "r", d, 16, LAYERS, k).to_pb()
        for d in ("bfloat16", "float16")
        for k in (None, FP8)
    }
    pairs = {
        (a, b)
        for a, source in layouts.items()
        for b, target in layouts.items()
        if target.fingerprint == source.float8_fingerprint
    }
    assert pairs == {(("bfloat16", None), ("bfloat16", FP8)), (("float16", None), ("float16", FP8))}
    assert not layouts["bfloat16", FP8].float8_fingerprint


def test_transports_that_take_blocks_as_they_are_stay_out():
    from kv_transfer.base import Endpoint

    chosen, why = candidates("nixl", {"nixl": ""}, {}, [Endpoint("nixl")], has_equal_blocks=False)
    assert not chosen and why == ["nixl: the blocks differ in size or dtype"]


def test_a_deployment_says_which_pool_keeps_float8():
    def config(prefill: str | None, decode: str | None, **more) -> DeploymentConfig:
        pools = {"prefill": {"kv_cache_dtype": prefill}, "decode": {"kv_cache_dtype": decode}}
        return DeploymentConfig.model_validate({"pools": pools, **more})

    (
        config(None, "fp8"),
        config("auto", "fp8"),
        config("fp8", "fp8"),
        config(None, None, model={"kv_cache_dtype": "fp8"}),
    )
    with pytest.raises(ValueError, match="prefill keeps fp8 and decode auto: KV is rounded on the way, never back"):
        config("fp8", None)
    with pytest.raises(ValueError, match="kv_return: prefill keeps auto and decode fp8"):
        config(None, "fp8", kv_return=True)


# ---------------------------------------------------------------- the service


async def test_a_decode_worker_in_float8_takes_the_prompts_of_one_that_is_not(tiny: Path):
    answers = []
    for block_size in (16, 32):
        decode_engine = dict(kv_cache_dtype="fp8", block_size=block_size)
        async with service(tiny, engine=dict(load_format="dummy"), decode_engine=decode_engine) as it:
            answer = await it.generate(request("hello " * 40, 8))
            rounded = RoundedMemory.of(it.worker("prefill")._receiver.memory)
            assert answer.timings is not None and answer.timings.kv_transport == "grpc as float8_e4m3fn"
            assert answer.timings.kv_transfer_bytes % rounded.width(0, rounded.num_layers) == 0
            canary = await it.worker("prefill").canary("decode-1", 4)
            assert canary["ok"] and canary["transport"] == "grpc as float8_e4m3fn"
            answers.append(answer.token_ids)
    assert answers[0] == answers[1]


async def test_the_other_way_round_is_refused(tiny: Path):
    async with service(
        tiny, engine=dict(load_format="dummy", kv_cache_dtype="fp8"), decode_engine=dict(kv_cache_dtype="auto")
    ) as it:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await it.generate(request("hello"))
        assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "KV float32" in str(raised.value.details()) and "KV float8_e4m3fn" in str(raised.value.details())
        canary = await it.worker("prefill").canary("decode-1", 4)
        assert "with KV in float8_e4m3fn" in canary["error"]
