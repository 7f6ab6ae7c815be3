"""``mixkv`` for lmms_eval: any of its models that generate with transformers, with a compressed cache.

``lmms-eval --model mixkv --model_args base=qwen2_5_vl,pretrained=...,budget=128`` finds it by its entry point.
"""

from __future__ import annotations

from typing import Any

from lmms_eval import models
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from loguru import logger

from ..cache import MixKVCache
from ..hf.binding import unwrap
from ..hf.versions import cache_argument
from . import options
from .tally import Tally


def compressed(base: type[lmms]) -> type[lmms]:
    """A subclass of a model class of lmms_eval that also takes the fields of `MixKVConfig`.

    Every call of ``model.generate`` uses a new `MixKVCache`.
    """
    return type(f"MixKV{base.__name__}", (_Compressed, base), {})


class MixKVLMM(lmms):
    """The model ``mixkv``: creates a `compressed` instance of the lmms_eval model ``base``."""

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> lmms:
        """Creates the model, as lmms_eval calls it.

        Args:
            arg_string: ``base=NAME``, fields of `MixKVConfig` (``kv_backend`` for its ``backend``), and what the model
                ``base`` takes.

        Raises:
            ValueError: ``base`` is missing, an option is invalid, or the model cannot be compressed.
        """
        given = simple_parse_args_string(arg_string)
        given |= {name: value for name, value in (additional_config or {}).items() if value is not None}
        base = given.pop("base", None)
        if base is None:
            raise ValueError("base= is missing in --model_args: name the lmms_eval model to compress, such as base=qwen2_5_vl")
        return compressed(models.get_model(base))(**given)


class _Compressed:
    """Precedes a model class of lmms_eval in the method resolution order."""

    model: Any

    def __init__(self, **given: Any):
        self.kv_config, others = options.split(given)
        super().__init__(**others)
        self.tally = Tally()
        self._failures: list[Exception] = []
        self._wrap_generate()

    def _wrap_generate(self) -> None:
        """Makes ``self.model.generate``, which the model class calls in its own loop, use a new cache each time."""
        model = unwrap(self.model)
        plain = model.generate
        # Raises an error now, not at the first request, if the model cannot be compressed.
        MixKVCache(model, self.kv_config)

        def generate(*args: Any, **inputs: Any):
            try:
                if inputs.get("use_cache") is False:
                    raise ValueError("use_cache=False leaves mixkv nothing to compress: remove it from --model_args")
                cache = MixKVCache(model, self.kv_config)
                tokens = plain(*args, **cache_argument(cache), **inputs)
                self.tally.add(cache, inputs.get("attention_mask"))
                return tokens
            except Exception as error:
                self._failures.append(error)
                raise

        model.generate = generate

    def generate_until(self, requests: list) -> list:
        """Calls the model class, and logs the sizes of all caches so far.

        Raises:
            RuntimeError: a generation failed (some model classes return empty answers then), or ``generate`` was not called.
        """
        answers = super().generate_until(requests)  # type: ignore[misc]
        if self._failures:
            raise RuntimeError(
                f"{len(self._failures)} generations failed, the first with: {self._failures[0]}"
            ) from self._failures[0]
        if requests and not self.tally.report()["caches"]:
            raise RuntimeError(
                f"{type(self).__name__} answered without calling model.generate, so that nothing was compressed: use another base="
            )
        logger.info(f"mixkv held {self.tally.report()}")
        warning = self.tally.warning(self.kv_config.budget)
        if warning is not None:
            logger.warning(warning)
        return answers

    def loglikelihood(self, requests: list) -> list:
        """Not supported: the models of lmms_eval score with one full forward, without a cache.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "mixkv compresses generations only in lmms_eval: for a task of output_type loglikelihood use the model itself"
        )
