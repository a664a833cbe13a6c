"""The serving tokenizer: text to ids, ids to bytes, chat messages to a prompt. Needs `tokenizers` and jinja2 alone.

Chat templates come with a checkpoint and their inputs from clients, so they run in jinja2's immutable sandbox, with the
globals that templates on the hub expect.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from router.detokenizer import Detokenizer, Vocabulary
from router.errors import InvalidRequest

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Loaded once per router; thread-safe, and encoding releases the GIL.

    Raises ValueError if the directory has no tokenizer.json.
    """

    def __init__(self, directory: Path):
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"model directory {str(directory)!r} has no tokenizer.json; pdserve needs a fast tokenizer"
            )
        self._fast = FastTokenizer.from_file(str(path))
        # A file saved with truncation or padding on would silently change prompts.
        self._fast.no_truncation()
        self._fast.no_padding()
        settings = _read_json(directory / "tokenizer_config.json")
        self._special = _special_tokens(settings, _read_json(directory / "special_tokens_map.json"))
        source = _chat_template(directory, settings)
        self._template = _environment().from_string(source) if source else None
        self.vocabulary = Vocabulary(self._fast)

    @property
    def supports_chat(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # `encode` would hold the GIL, and 4 MB take seconds.
        return self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def least_tokens(self, text: str) -> int:
        """A lower bound on len(encode(text)), without encoding."""
        return -(-len(text) // self.vocabulary.max_token_chars) if self.vocabulary.max_token_chars else 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder for one sequence; special tokens are skipped."""
        return Detokenizer(self.vocabulary)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The model's template over `messages`. The result brings its own special tokens: encode without adding any.

        InvalidRequest if there is no template or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("chat", "the served model has no chat template; use text or token_ids")
        try:
            return self._template.render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                "chat.messages", f"refused by the model's chat template: {error.message or error}"
            ) from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise InvalidRequest("chat.messages", f"the model's chat template failed on them: {error!r}") from None


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str:
    """chat_template.jinja if there is one, else tokenizer_config.json's entry, else an empty string."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template") or ""
    if isinstance(found, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default", "")
    return found


def _special_tokens(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like, which templates use as variables."""
    tokens = {}
    for name in _NAMED_TOKENS:
        value = settings.get(name, saved.get(name))
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates on the hub are written for: the environment of transformers' apply_chat_template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


class _GenerationBlock(Extension):
    """{% generation %}...{% endgeneration %} marks assistant text for training; here its body is plain template."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own escapes HTML characters, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
