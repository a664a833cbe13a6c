"""Where a DeploymentConfig comes from: a YAML file, `--set key=value` on top, checks with readable errors."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import DeploymentConfig


class ConfigError(ValueError):
    """One line per problem, each with the full key, its value and what is allowed."""


def load(path: Path | None = None, overrides: Sequence[str] = ()) -> DeploymentConfig:
    """The file's settings with the overrides on top. Raises ConfigError."""
    data = _read(path) if path else {}
    for override in overrides:
        _apply(data, override)
    try:
        return DeploymentConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from None


def keys(model: type[BaseModel] = DeploymentConfig, prefix: str = "") -> Iterator[str]:
    """Every key there is, as a dotted path."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, got {type(data).__name__}")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    """`pools.decode.replicas=2` or, inside a free mapping, `pools.decode.label_selector.ray.io/zone=a`."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: must be key=value, such as pools.decode.replicas=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    path = _split(key.strip())
    for part in path[:-1]:
        below = data.setdefault(part, {})
        if not isinstance(below, dict):
            below = data[part] = {}
        data = below
    data[path[-1]] = value


def _split(key: str) -> list[str]:
    model: Any = DeploymentConfig
    parts: list[str] = []
    rest = key
    while rest:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return [*parts, rest]  # a free mapping's own key may hold dots
        part, _, rest = rest.partition(".")
        parts.append(part)
        field = model.model_fields.get(part)
        if field is None:
            return [*parts, rest] if rest else parts
        model = field.annotation
    return parts


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key{_suggest(path)}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace("valid dictionary", "mapping")
    if isinstance(problem["input"], dict | BaseModel) and problem["type"] == "value_error":
        return f"{path}: {message}" if path else message
    if problem["type"].startswith("model_"):
        message = "must be a mapping of keys"
    return f"{path}={problem['input']!r}: {message}"


def _suggest(path: str) -> str:
    known = list(keys())
    parent, _, name = path.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    anywhere: dict[str, str] = {}
    for key in known:
        anywhere.setdefault(key.rpartition(".")[2], key)
    for names in (siblings, anywhere):
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        if close:
            return f"; did you mean {names[close[0]]}?"
    where = f"under {parent}" if parent else "at the top"
    return f"; known {where}: {', '.join(sorted(siblings))}" if siblings else ""
