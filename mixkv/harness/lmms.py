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
    """A model class of lmms_eval, in a variant that takes the fields of `MixKVConfig` besides its own arguments.

    Every call of ``model.generate`` gets a fresh `MixKVCache`.
    """
    return type(f"MixKV{base.__name__}", (_Compressed, base), {})


class MixKVLMM(lmms):
    """The name ``mixkv``: makes a `compressed` instance of the lmms_eval model that ``base`` names."""

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> lmms:
        """As lmms_eval calls it.

        Args:
            arg_string: ``base=NAME``, fields of `MixKVConfig` (``kv_backend`` for its ``backend``), and what the model
                ``base`` takes.

        Raises:
            ValueError: ``base`` is missing, an option is not allowed, or the model cannot be compressed.
        """
        given = simple_parse_args_string(arg_string)
        given |= {name: value for name, value in (additional_config or {}).items() if value is not None}
        base = given.pop("base", None)
        if base is None:
            raise ValueError("base= is missing in --model_args: name the lmms_eval model to compress, such as base=qwen2_5_vl")
        return compressed(models.get_model(base))(**given)


class _Compressed:
    """Stands before a model class of lmms_eval."""

    def __init__(self, **given: Any):
        self.kv_config, others = options.split(given)
        super().__init__(**others)
        self.tally = Tally()
        self._failures: list[Exception] = []
        self._bring_caches()

    def _bring_caches(self) -> None:
        """The model class calls ``self.model.generate`` amid its own loop: from here on that brings a cache along."""
        model = unwrap(self.model)
        plain = model.generate
        # A model that cannot be compressed is refused here, not at the first request.
        MixKVCache(model, self.kv_config)

        def generate(*args: Any, **inputs: Any):
            try:
                if inputs.get("use_cache") is False:
                    raise ValueError("use_cache=False leaves mixkv nothing to compress: leave it out of --model_args")
                cache = MixKVCache(model, self.kv_config)
                tokens = plain(*args, **cache_argument(cache), **inputs)
                self.tally.add(cache, inputs.get("attention_mask"))
                return tokens
            except Exception as error:
                self._failures.append(error)
                raise

        model.generate = generate

    def generate_until(self, requests: list) -> list:
        """As the model class; logs what the caches of this evaluation held so far.

        Raises:
            RuntimeError: a generation failed (some model classes answer with nothing then), or none came to the model.
        """
        answers = super().generate_until(requests)
        if self._failures:
            raise RuntimeError(
                f"{len(self._failures)} generations failed, the first so: {self._failures[0]}"
            ) from self._failures[0]
        if requests and not self.tally.report()["caches"]:
            raise RuntimeError(
                f"{type(self).__name__} answered without calling model.generate, so that nothing was compressed: take another base="
            )
        logger.info(f"mixkv held {self.tally.report()}")
        warning = self.tally.warning(self.kv_config.budget)
        if warning is not None:
            logger.warning(warning)
        return answers

    def loglikelihood(self, requests: list) -> list:
        """Refused: lmms_eval's models score with one full forward, which no cache enters.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "mixkv compresses generations only in lmms_eval: for a task of output_type loglikelihood take the model itself, not mixkv"
        )
