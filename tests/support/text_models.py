"""A tiny random Llama, a tokenizer of 64 words and texts in them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}user {{ message['content'] }} {% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)


def make_model(**changes):
    torch.manual_seed(0)
    settings = dict(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = LlamaConfig(**{**settings, "max_position_embeddings": 512, "eos_token_id": None, "bos_token_id": 0, **changes})
    return LlamaForCausalLM(config).eval()


def make_tokenizer(template=TEMPLATE):
    words = ["[UNK]", "user", "answer", *(f"w{index}" for index in range(61))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", chat_template=template)


def make_text(words):
    return " ".join(f"w{index * 7 % 61}" for index in range(words))
