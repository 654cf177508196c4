"""Loading a processor, also where its part for videos cannot be loaded or old files leave something out."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slitlamp.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

_LIBRARIES = ("torchvision", "num2words", "sentencepiece", "tiktoken")
"""What transformers does not require and some processors do; of each, its name for `import` and for pip."""

_SAME_FOR_IMAGES = {"SmolVLMProcessor": "Idefics3Processor"}
"""Processor classes that cannot do without their part for videos -> those that make the same tokens and pixels."""


def load_processor(name: str | Path, **hub: Any) -> Any:
    """The processor of a model's images and texts, from a folder or a hub.

    Hugging Face's `AutoProcessor` makes it. Where that fails and all but the processor's part for videos can be loaded, for
    want of a library or of its file, it is put together without that part: `processor.video_processor` is None. It makes
    the same tokens and pixels of texts and images. That is logged; nothing is ever installed.

    Args:
        name: folder or hub id.
        hub: `revision`, `trust_remote_code` and what else `from_pretrained` takes to find the files.

    Raises:
        UnsupportedError: it needs a library that is not installed; the message names it.
        InputError: there is no processor, only a tokenizer or another of its parts.
        OSError: no such folder or repository, or no such file in it.
    """
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(name, **hub)
    except (ImportError, OSError, ValueError) as error:
        processor = _without_videos(name, hub, error)
    if not hasattr(processor, "tokenizer"):
        raise InputError(
            f"a VLM needs the processor of its images and texts; found {type(processor).__name__} in {str(name)!r}. "
            "Its processor_config.json or preprocessor_config.json must name a `processor_class` of transformers"
        )
    return processor


def _without_videos(name: str | Path, hub: dict[str, Any], error: Exception) -> Any:
    """The processor without its part for videos.

    Args:
        name, hub: as of `load_processor`.
        error: what came of the whole processor; raised again where leaving that part out is no remedy.

    Raises:
        UnsupportedError: what is left needs a library that is not installed.
    """
    import transformers

    named = _class_name(name, hub)
    if named is None or not hasattr(transformers, named):
        raise error
    used = _SAME_FOR_IMAGES.get(named, named)
    try:
        processor_class = getattr(transformers, used)
        attributes = [one for one in processor_class.get_attributes() if one != "video_processor"]
        if used == named and attributes == processor_class.get_attributes():
            raise error
        # what the class loads, checks and saves are its attributes
        own = {"video_processor": None, "get_attributes": classmethod(lambda cls: list(attributes))}
        without: Any = type(used, (processor_class,), own)
        processor = without.from_pretrained(name, **hub)
    except (ImportError, OSError, ValueError) as reason:
        libraries = _missing(reason, name)
        if not libraries:
            raise
        raise UnsupportedError(
            f"the processor of {str(name)!r} ({named}) needs {' and '.join(libraries)}, which this environment does not "
            f"have; install: pip install {' '.join(libraries)}"
        ) from reason
    if used != named:  # a text with a video is refused, as by the class itself
        processor.video_token = getattr(processor.tokenizer, "video_token", "<video>")
    logger.info(
        "%s: its processor (%s%s) is loaded without the part for videos: %s",
        name,
        named,
        "" if used == named else f", as {used}",
        " and ".join(_missing(error, name)) + " not installed" if _missing(error, name) else error,
    )
    return processor


def complete(processor: Any, config: PreTrainedConfig, *, has_cls: bool) -> None:
    """Set what a processor's files leave out and the model's configuration says; that is logged.

    Files of before transformers 4.46 do not say how many tokens an image becomes: `patch_size`,
    `vision_feature_select_strategy` and `num_additional_image_tokens` of LLaVA, `num_query_tokens` of BLIP-2.

    Args:
        processor: changed in place.
        config: of the model.
        has_cls: whether the tower has a CLS token.
    """
    said = {
        "patch_size": getattr(config.vision_config, "patch_size", None),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", "default"),
        "num_query_tokens": getattr(config, "num_query_tokens", None),
    }
    found = {name: value for name, value in said.items() if value is not None and getattr(processor, name, 0) is None}
    if "patch_size" in found and has_cls:
        found["num_additional_image_tokens"] = 1
    for name, value in found.items():
        setattr(processor, name, value)
    if found:
        logger.info("%s: taken from the model's configuration: %s", type(processor).__name__, found)


def _class_name(name: str | Path, hub: dict[str, Any]) -> str | None:
    """The processor class that the files name, or else that of the model's type; None where neither does."""
    from transformers import PROCESSOR_MAPPING, AutoConfig, ImageProcessingMixin, ProcessorMixin

    found: Any = ProcessorMixin.get_processor_dict(name, **hub)[0].get("processor_class")
    if found is None:
        with contextlib.suppress(OSError):  # no preprocessor_config.json
            found = ImageProcessingMixin.get_image_processor_dict(name, **hub)[0].get("processor_class")
    if found is None:
        config = type(AutoConfig.from_pretrained(name, **hub))
        found = getattr(PROCESSOR_MAPPING.get(config, None), "__name__", None)
    return found


def _missing(error: Exception, name: str | Path) -> list[str]:
    """The libraries that an error names, elsewhere than in the name of the model, and that are not installed."""
    text = str(error).replace(str(name), "").lower()
    return [one for one in _LIBRARIES if one in text and importlib.util.find_spec(one) is None]


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of transformers, for what loads at once; afterwards they are as before."""
    from transformers.utils import logging as transformers_logging

    drawn = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            transformers_logging.enable_progress_bar()
