"""The methods of InferenceService. Each takes a parsed request and raises RequestError; rpc.py does the rest."""

import asyncio
import logging
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from protos import inference_pb2 as pb
from router import validate
from router.collect import Collector
from router.errors import InvalidRequest, RequestError, bug, to_pb
from router.pipeline import Pipeline, Send
from router.validate import Accepted

if TYPE_CHECKING:
    from router.server import Router

log = logging.getLogger(__name__)

THREAD_PROMPT_CHARS = 16_000  # longer prompts are tokenized in a thread: about 8 ms of this one's time
BATCH_CONCURRENCY = 64


class InferenceService:
    """Method names are the RPCs'."""

    def __init__(self, router: "Router"):
        self._router = router

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> None:
        await self._generate(request, context.write, context.time_remaining())

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        return await self._collect(request, context.time_remaining())

    async def GenerateBatch(self, request: pb.GenerateBatchRequest, context: Any) -> None:
        limit = self._router.config.limits.max_batch_requests
        if not 1 <= len(request.requests) <= limit:
            raise InvalidRequest("requests", f"has {len(request.requests)} items; allowed is [1, {limit}]")
        deadline_s = context.time_remaining()
        slots = asyncio.Semaphore(BATCH_CONCURRENCY)
        labels: set[str] = set()
        started_at = time.monotonic()

        async def item(index: int, one: pb.GenerateRequest, is_repeated: bool) -> pb.GenerateBatchResponse:
            async with slots:
                try:
                    if is_repeated:
                        message = f"request_id {one.request_id!r} is in this batch already"
                        raise RequestError(pb.ERROR_REASON_DUPLICATE_REQUEST_ID, message)
                    left_s = None if deadline_s is None else deadline_s - (time.monotonic() - started_at)
                    return pb.GenerateBatchResponse(index=index, response=await self._collect(one, left_s))
                except RequestError as error:
                    return pb.GenerateBatchResponse(index=index, error=to_pb(error))
                except Exception:
                    log.exception("item %d of a batch failed by a bug", index)
                    return pb.GenerateBatchResponse(index=index, error=to_pb(bug()))

        tasks = []
        async with asyncio.TaskGroup() as group:  # cancelled with the call, and takes every item along
            for index, one in enumerate(request.requests):
                is_repeated = bool(one.request_id) and one.request_id in labels
                labels.add(one.request_id)
                tasks.append(group.create_task(item(index, one, is_repeated)))
            for done in asyncio.as_completed(tasks):
                await context.write(await done)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        router = self._router
        validate.check_model(request.model, router.model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("input", "is missing; set one of text, chat")
        if kind == "chat":
            validate.check_chat("chat", request.chat)
            token_ids = await self._encode(self._chat_text(request.chat), False)
        else:
            add_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            token_ids = await self._encode(request.text, add_special)
        spell = router.tokenizer.vocabulary.token_bytes
        return pb.TokenizeResponse(
            token_ids=token_ids,
            max_model_len=self._max_model_len(),
            token_bytes=[spell(i) for i in token_ids] if request.return_token_bytes else (),
        )

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        router = self._router
        validate.check_model(request.model, router.model)
        validate.check_token_ids("token_ids", request.token_ids, router.model.vocab_size)
        return pb.DetokenizeResponse(text=router.tokenizer.decode(request.token_ids, request.skip_special_tokens))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        model = self._router.model
        said = next((w.info.model for w in self._router.pool.workers.values() if w.info is not None), pb.ModelInfo())
        info = pb.ModelInfo(
            id=model.name,
            root=model.root,
            max_model_len=self._max_model_len(),
            vocab_size=model.vocab_size,
            dtype=said.dtype or model.dtype,
            architectures=model.architectures,
            eos_token_ids=said.eos_token_ids or model.eos_token_ids,
            supports_chat=self._router.tokenizer.supports_chat,
            default_sampling=model.defaults,
        )
        return pb.ListModelsResponse(models=[info])

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        router = self._router
        prefill, decode = router.pool.num_ready()
        return pb.GetServerInfoResponse(
            version=_version(),
            instance_id=router.instance_id,
            start_time=router.started_at,
            limits=router.config.limits.to_pb(),
            running_requests=router.admission.num_in_flight,
            ready_prefill_workers=prefill,
            ready_decode_workers=decode,
        )

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        return pb.AbortResponse(
            aborted=sum(self._router.admission.abort(i) for i in dict.fromkeys(request.request_ids))
        )

    async def _collect(self, request: pb.GenerateRequest, timeout_s: float | None) -> pb.GenerateResponse:
        collector = Collector()
        await self._generate(request, collector.add, timeout_s)
        return collector.response()

    async def _generate(self, request: pb.GenerateRequest, send: Send, timeout_s: float | None) -> None:
        """The one path of every front end: parse, admit, tokenize, run. `timeout_s` is the call's time left."""
        router = self._router
        received_at = time.monotonic()
        longest_s = router.config.max_run_s
        deadline = received_at + (longest_s if timeout_s is None else min(timeout_s, longest_s))
        parsed = validate.parse(request, router.model, router.config.limits)
        with router.admission.enter(parsed.request_id) as ticket:
            token_ids = await self._prompt_ids(request)
            accepted: Accepted = validate.accept(parsed, token_ids, router.model, self._max_model_len())
            pipeline = Pipeline(accepted, router.pool, router.tokenizer, router.config, received_at, deadline)
            ticket.begin(pipeline)
            await pipeline.run(send)

    async def _prompt_ids(self, request: pb.GenerateRequest) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind == "token_ids":
            return list(request.token_ids.ids)
        if kind == "chat":
            return await self._encode(self._chat_text(request.chat), False, "chat")
        return await self._encode(request.text, True, "text")

    def _chat_text(self, chat: pb.ChatPrompt) -> str:
        messages = [{"role": m.role, "content": m.content} for m in chat.messages]
        opens_turn = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        return self._router.tokenizer.chat_prompt(messages, opens_turn)

    async def _encode(self, text: str, add_special_tokens: bool, prompt_field: str = "") -> list[int]:
        """`prompt_field` set: the text is a prompt, refused before it is tokenized if it can never fit."""
        encode = self._router.tokenizer.encode
        if prompt_field:
            least = self._router.tokenizer.least_tokens(text)
            validate.check_length(prompt_field, least, self._max_model_len(), at_least=True)
        if len(text) > THREAD_PROMPT_CHARS:
            return await asyncio.to_thread(encode, text, add_special_tokens)
        return encode(text, add_special_tokens)

    def _max_model_len(self) -> int:
        return self._router.pool.max_model_len(self._router.model.max_model_len)


def _version() -> str:
    try:
        return version("pdserve")
    except PackageNotFoundError:  # run from a checkout
        return "0+unknown"
