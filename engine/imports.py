"""What a start imports, with as little as can be beside it. Loads neither torch nor transformers by itself.

Imports are most of a start: some 3000 modules, one after the other, under Python's lock. Two things can be left out.
Collections of garbage walk all those objects again and again to find none (a quarter of the time). And transformers
imports what it finds installed for images, sound, object detection and assisted generation: a text model needs none.
"""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()

FEW = 1000  # objects: Python 3.12 freezes some by itself

# How transformers finds out about them.
NOT_FOR_TEXT = (
    "is_vision_available",
    "is_torchvision_available",
    "is_torchaudio_available",
    "is_torchcodec_available",
    "is_librosa_available",
    "is_soundfile_available",
    "is_scipy_available",
    "is_sklearn_available",
)


@contextmanager
def no_collections() -> Iterator[None]:
    """Garbage in cycles waits for the end, or for an explicit gc.collect()."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() < FEW:  # nobody else has frozen anything
            gc.freeze()  # and back, into the oldest generation, which the next collections do not walk
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def import_transformers() -> None:
    """What any text model needs of it: what the first use of AutoModelForCausalLM would import, and less."""
    with _one_at_a_time, no_collections(), text_only():
        for name in ("generation.candidate_generator", "modeling_utils", "processing_utils"):
            try:
                __import__(f"transformers.{name}")
            except ImportError as error:  # it has moved
                log.debug("transformers.%s is not imported ahead: %s", name, error)
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM  # noqa: F401


@contextmanager
def text_only() -> Iterator[None]:
    """To what transformers imports inside, the packages of NOT_FOR_TEXT are not installed.

    Afterwards it gives true answers, also to the modules of that time, which keep the functions that they asked. What
    they did not import stays away: a process that has loaded a text model first cannot use transformers for images.
    """
    from transformers import utils
    from transformers.utils import import_utils

    is_inside = True

    def hidden(own: Callable[..., bool]) -> Callable[..., bool]:
        return lambda *args, **kwargs: not is_inside and own(*args, **kwargs)

    places = [(module, name) for module in (utils, import_utils) for name in NOT_FOR_TEXT if hasattr(module, name)]
    owns = [getattr(*place) for place in places]
    for place, own in zip(places, owns, strict=True):
        setattr(*place, hidden(own))
    try:
        yield
    finally:
        is_inside = False
        for place, own in zip(places, owns, strict=True):
            setattr(*place, own)
        for other in vars(import_utils).values():  # some remember what they concluded from these
            if hasattr(other, "cache_clear"):
                other.cache_clear()
