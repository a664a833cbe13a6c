"""A request's stream gathered into one GenerateResponse, for Generate and GenerateBatch."""

from protos import inference_pb2 as pb


class Collector:
    """`add` is a pipeline's send; `response` is complete once the pipeline has returned."""

    def __init__(self) -> None:
        self._response = pb.GenerateResponse()
        self._outputs: dict[int, pb.SequenceOutput] = {}
        self._texts: dict[int, list[str]] = {}

    async def add(self, message: pb.GenerateStreamResponse) -> None:
        response = self._response
        response.request_id = message.request_id
        if message.HasField("prompt_info"):
            response.prompt_info.CopyFrom(message.prompt_info)
        if message.HasField("delta"):
            delta = message.delta
            output = self._output(delta.index)
            self._texts.setdefault(delta.index, []).append(delta.text)
            output.token_ids.extend(delta.token_ids)
            output.logprobs.extend(delta.logprobs)
        if message.HasField("finish_info"):
            self._output(message.finish_info.index).finish_info.CopyFrom(message.finish_info)
        if message.HasField("usage"):
            response.usage.CopyFrom(message.usage)
        if message.HasField("timings"):
            response.timings.CopyFrom(message.timings)

    def response(self) -> pb.GenerateResponse:
        for index in sorted(self._outputs):
            output = self._outputs[index]
            output.text = "".join(self._texts.get(index, ()))
            self._response.outputs.append(output)
        return self._response

    def _output(self, index: int) -> pb.SequenceOutput:
        return self._outputs.setdefault(index, pb.SequenceOutput(index=index))
