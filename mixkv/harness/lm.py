"""``mixkv`` for lm_eval: its model ``hf``, answering and scoring from a compressed cache.

``python -m mixkv.harness`` is lm_eval's command line with this model in it; from Python, import this module before
`lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..cache import MixKVCache
from ..hf.binding import unwrap
from ..hf.versions import cache_argument, last_logits_only
from . import options, questions
from .tally import Tally

_LOG = logging.getLogger(__name__)


@register_model("mixkv")
class MixKVLM(HFLM):
    """lm_eval's ``hf`` with a fresh `MixKVCache` for every context.

    Generation uses ``model.generate``. For a log-likelihood, the context without its last token is compressed; that token and
    the continuation are fed after it, so that every scored token is predicted from the compressed cache. Continuations of one
    context share its prefill. Contexts are prefilled one at a time; ``batch_size`` applies to generation.

    With ``question_lines`` the context of a generation is compressed before its question is known, as where a document is read
    once and asked later: the last ``question_lines`` lines of a prompt are its question. RULER's synthetic tasks have one.

    Args:
        pretrained: as for ``hf``.
        question_lines: how many lines at the end of a prompt are its question; 0: prompts are compressed with their question.
        kwargs: fields of `MixKVConfig` (``kv_backend`` for its ``backend``), and what ``hf`` takes.

    Raises:
        ValueError: an option is invalid, or the model cannot be compressed; the message names the option or the reason.
    """

    def __init__(self, pretrained, question_lines: int | str = 0, **kwargs):
        if not str(question_lines).isdecimal():
            raise ValueError(
                f"question_lines={question_lines!r} must be a number of lines: 1 for RULER's tasks, 0 for no question"
            )
        self.question_lines = int(question_lines)
        self.kv_config, others = options.split(kwargs)
        super().__init__(pretrained, **others)
        self.tally = Tally()
        # Raises an error now, not at the first request, if the model cannot be compressed.
        self._new_cache()

    def _new_cache(self) -> MixKVCache:
        return MixKVCache(unwrap(self.model), self.kv_config)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs) -> torch.Tensor:
        if self.question_lines:
            return self._generate_later(context, max_length, stop, **generation_kwargs)
        cache = self._new_cache()
        tokens = super()._model_generate(context, max_length, stop, **cache_argument(cache), **generation_kwargs)
        self.tally.add(cache, generation_kwargs.get("attention_mask"))
        return tokens

    def _generate_later(self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs) -> torch.Tensor:
        """As `_model_generate`, one batch row after the other, each with its context compressed before its question."""
        mask = generation_kwargs.pop("attention_mask", torch.ones_like(context)).bool()
        answers = []
        for row, real in zip(context, mask):
            prompt = row[real]
            cache = self._read(tuple(prompt[: questions.start(prompt.tolist(), self.tokenizer, self.question_lines)].tolist()))
            room = max_length - context.shape[1] + prompt.numel()
            options = {"attention_mask": torch.ones_like(prompt)[None], **cache_argument(cache), **generation_kwargs}
            answers.append(super()._model_generate(prompt[None], room, stop, **options)[0, prompt.numel() :])
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([context, padded], dim=1)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            by_context[self._fit(context, continuation)].append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring from compressed caches") as bar:
            # The longest first, so that a lack of memory shows at once.
            for prefix in sorted(by_context, key=len, reverse=True):
                cache = self._read(prefix[:-1])
                indices = by_context[prefix]
                for index in indices:
                    own = cache if index == indices[-1] else copy.deepcopy(cache)
                    text, _, continuation = requests[index]
                    answers[index] = self._score(own, prefix[-1], continuation)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[index])
                    bar.update(1)
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The end of the context that fits the model beside the continuation, at least one token."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens leaves no room for a context in max_length={self.max_length}: raise it "
                f"if the model allows, or use a task with shorter continuations"
            )
        if len(context) > room:
            _LOG.warning("a context of %d tokens is cut to its last %d, to fit the model", len(context), room)
        return tuple(context[-room:])

    def _read(self, context: tuple[int, ...]) -> MixKVCache:
        cache = self._new_cache()
        if context:
            self._logits(cache, context, last_only=True)
            self.tally.add(cache)
        return cache

    def _score(self, cache: MixKVCache, last: int, continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of ``continuation`` after ``last``, in nats, and whether greedy decoding would give it."""
        logits = self._logits(cache, (last, *continuation[:-1]))
        wanted = torch.tensor(continuation, device=logits.device)
        logs = logits.log_softmax(-1, dtype=self.softmax_dtype)
        return logs.gather(-1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())

    @torch.no_grad()
    def _logits(self, cache: MixKVCache, tokens: tuple[int, ...], last_only: bool = False) -> torch.Tensor:
        """Feeds ``tokens``: logits [n, V], or with ``last_only`` [1, V] if the model has that option."""
        optional = last_logits_only(unwrap(self.model)) if last_only else {}
        ids = torch.tensor([tokens], device=self.device)
        dtype = self.mixed_precision_dtype
        with torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(input_ids=ids, **cache_argument(cache), use_cache=True, **optional).logits[0]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Not supported: a text without a prompt has nothing to compress.

        Raises:
            NotImplementedError: always.
        """
        names = sorted({request.task_name for request in requests if request.task_name})
        raise NotImplementedError(
            f"{', '.join(names) or 'the task'} requests the likelihood of whole texts: without a prompt there is nothing for mixkv to "
            f"compress. Use --model hf for it, or a task that scores continuations or generates"
        )

    def get_model_info(self) -> dict[str, Any]:
        """The information of ``hf``, and under ``mixkv`` the config and the report of `Tally`."""
        warning = self.tally.warning(self.kv_config.budget)
        if warning is not None:
            _LOG.warning(warning)
        return {**super().get_model_info(), "mixkv": {**self.kv_config.to_dict(), "held": self.tally.report()}}
