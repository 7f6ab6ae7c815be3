"""Compresses the KV cache of one `generate` call: ``model.generate(..., custom_generate=FOLDER, trust_remote_code=True)``.

FOLDER is the folder, or the repository on the Hugging Face hub, that contains ``custom_generate/``.
"""

import dataclasses

import mixkv

_OPTIONS = tuple(field.name for field in dataclasses.fields(mixkv.MixKVConfig))


def generate(model, *, mixkv_config=None, **arguments):
    """What ``model.generate(**arguments)`` returns, with a compressed KV cache.

    Args:
        model: the model whose `generate` was called.
        mixkv_config: a `mixkv.MixKVConfig`, or a dict of its fields; None: the default one.
        arguments: fields of `mixkv.MixKVConfig` (``budget``, ``method``, ``score``, ...), which take precedence over
            ``mixkv_config``, and the arguments of `generate`. As with `mixkv.patch`, a cache among them is used as it is.

    Raises:
        ValueError: bad options, or a model that cannot be compressed.
    """
    options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
    if isinstance(mixkv_config, dict):
        mixkv_config = mixkv.MixKVConfig.from_dict(mixkv_config)
    with mixkv.patched(model, mixkv_config, **options):
        # The method of the class: of a model loaded from such a repository, model.generate is this function.
        return type(model).generate(model, **arguments)
