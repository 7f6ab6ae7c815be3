"""A question about an image to Qwen2-VL, answered with the full cache and with a compressed cache.

pip install 'mixkv[vision]'
python examples/qwen2_vl.py IMAGE [QUESTION] [--model Qwen/Qwen2-VL-7B-Instruct] [--budget 128]

qwen_vl_utils imports torchvision, which must be of the same build as torch: both for CUDA or both for the CPU.
"""

import argparse

from qwen_vl_utils import process_vision_info
from transformers import AutoModelForImageTextToText, AutoProcessor

import mixkv


def conversation(image, question):
    """One user turn; ``image`` is a path, a URL or a PIL image."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def encode(processor, messages):
    """``generate()`` arguments for one conversation."""
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = process_vision_info(messages)
    return processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt")


def answer(model, processor, inputs, cache=None, max_new_tokens=64):
    tokens = model.generate(**inputs, cache=cache, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def main(model, processor, image, question, budget):
    inputs = encode(processor, conversation(image, question)).to(model.device)
    print(f"prompt:     {inputs['input_ids'].shape[1]} tokens")
    print("full cache:", answer(model, processor, inputs))

    cache = mixkv.MixKVCache(model, budget=budget)
    print("compressed:", answer(model, processor, inputs, cache))
    held = cache.stats()
    print(f"held {held['bytes'] / 2**20:.1f} MiB instead of {held['bytes_full'] / 2**20:.1f} MiB ({held['ratio']:.1%})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="path or URL")
    parser.add_argument("question", nargs="?", default="Describe this image.")
    parser.add_argument("--model", default="Qwen/Qwen2-VL-7B-Instruct")
    parser.add_argument("--budget", type=int, default=128, help="KV entries per KV head")
    given = parser.parse_args()
    loaded = AutoModelForImageTextToText.from_pretrained(given.model, dtype="auto", device_map="auto")
    main(loaded, AutoProcessor.from_pretrained(given.model), given.image, given.question, given.budget)
