"""The target of the entry point ``lmms_eval.models``: names the class of the model ``mixkv`` without importing it."""


def manifest():
    """lmms_eval's `ModelManifest` of `mixkv.harness.lmms.MixKVLMM`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mixkv", chat_class_path="mixkv.harness.lmms.MixKVLMM")
