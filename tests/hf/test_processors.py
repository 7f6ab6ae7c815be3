"""Every vision family from a PIL image through its own processor and chat template to `generate` on a compressed cache."""

import pytest
import torch
import transformers
from support import oracle, zoo, zoo_processors

import mixkv

FAMILIES = list(zoo_processors.RECIPES)
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SMALL = dict(budget=14, window=6, kernel_size=3)
STEPS = 3
# Placeholder tokens of a 24 x 40 and of a 24 x 24 image (height x width), each alone in its prompt.
TOKENS = {
    "qwen2_vl": [15, 9],  # merged 8 x 8 pixel cells
    "qwen2_5_vl": [15, 9],
    "qwen3_vl": [15, 9],
    "llava": [9, 9],  # cropped to a square
    "llava_next": [14, 24],  # thumbnail, 2 x 4 without padding or 4 x 4 patches, a newline a row
    "llava_onevision": [14, 24],
    "internvl": [27, 9],  # thumbnail and two tiles; one tile
    "smolvlm": [45, 45],  # thumbnail and 2 x 2 tiles
    "idefics3": [45, 45],
    "gemma3_vision": [9, 9],
    "mllama": [1, 1],
}


def pictures():
    """A wide and a square image."""
    return zoo_processors.picture(24, 40, seed=1), zoo_processors.picture(24, 24, seed=2)


def rows():
    """The images of a prompt with two and of a prompt with one."""
    wide, square = pictures()
    return [[wide, square], [square]]


def image_tokens(prompts):
    return prompts["input_ids"].eq(zoo.IMAGE).sum(1).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_processor_tiles_as_in_earnest(name):
    processor = zoo_processors.build(name)
    prompts = [zoo_processors.encode(processor, [[image]]) for image in pictures()]
    assert [image_tokens(prompt)[0] for prompt in prompts] == TOKENS[name]
    for prompt in prompts:
        assert not prompt["input_ids"].eq(zoo_processors.UNKNOWN).any()
        assert prompt["input_ids"].eq(zoo_processors.TURN).sum() == 2
        assert torch.isin(prompt["input_ids"], torch.tensor(list(zoo_processors.WORDS))).sum() == 16


@pytest.mark.parametrize("name", FAMILIES)
def test_the_chat_template_in_one_step(name):
    """apply_chat_template reads the images out of the conversation itself: the same tensors."""
    processor, (wide, square) = zoo_processors.build(name), pictures()
    messages = zoo_processors.conversation([wide, square], seed=0, length=16)
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    at_once = processor.apply_chat_template(messages, **options)
    in_steps = zoo_processors.encode(processor, [[wide, square]])
    assert set(at_once) == set(in_steps)
    for key, value in in_steps.items():
        assert torch.equal(torch.as_tensor(at_once[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_equals_masked_full_cache(name):
    model, processor = zoo.build(name), zoo_processors.build(name)
    check_oracle(model, zoo_processors.encode(processor, rows(), lengths=[24, 24]))


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_batch_equals_its_rows_alone(name):
    model, processor = zoo.build(name), zoo_processors.build(name)
    # mllama itself gives a row other logits beside a row of more images: its cross-attention is padded with blank ones.
    images, lengths = [[image] for image in pictures()] if name == "mllama" else rows(), [24, 17]
    batch = zoo_processors.encode(processor, images, lengths=lengths)
    assert not batch["attention_mask"].all(), "no row is padded"
    cache = mixkv.MixKVCache(model, **SMALL)
    tokens, logits = oracle.generate(model, batch, STEPS, past_key_values=cache)
    for index, own in enumerate(images):
        prompt = zoo_processors.encode(processor, [own], seeds=[index], lengths=lengths[index : index + 1])
        alone = mixkv.MixKVCache(model, **SMALL)
        row_tokens, row_logits = oracle.generate(model, prompt, STEPS, past_key_values=alone)
        assert torch.equal(tokens[index], row_tokens[0])
        assert (logits[index] - row_logits[0]).abs().max() <= 1e-4
        pad = batch["input_ids"].shape[1] - prompt["input_ids"].shape[1]
        oracle.assert_keeps_as_alone(cache, index, alone, pad)


def test_gemma3_crops_of_a_wide_image():
    crops = dict(do_pan_and_scan=True, pan_and_scan_min_crop_size=16, pan_and_scan_max_num_crops=4)
    processor = zoo_processors.build("gemma3_vision")
    messages = zoo_processors.conversation([zoo_processors.picture(24, 64)], seed=0, length=24)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompts = dict(processor(text=[text], images=[[zoo_processors.picture(24, 64)]], return_tensors="pt", **crops))
    assert prompts["pixel_values"].shape[0] == 4 and image_tokens(prompts) == [4 * 9]
    check_oracle(zoo.build("gemma3_vision"), prompts)


@pytest.mark.parametrize("name", QWEN)
def test_video_frames(name):
    """A video and an image in one row, a longer video in the other, read by qwen_vl_utils."""
    process_vision_info = zoo_processors.vision_tools().process_vision_info
    video_kind = transformers.Qwen3VLVideoProcessor if name == "qwen3_vl" else transformers.Qwen2VLVideoProcessor
    processor = zoo_processors.build(name, video_processor=video_kind(patch_size=4))
    # qwen2_5_vl of transformers 5.4 has no temporal positions for an image beside a video.
    beside = [] if name == "qwen2_5_vl" else [pictures()[1]]
    messages = [video_turn(4, 0, beside), video_turn(6, 1, [])]
    images, videos = process_vision_info(messages, image_patch_size=4, return_video_metadata=name == "qwen3_vl")
    options = dict(do_resize=False, do_sample_frames=False, padding=True, return_tensors="pt")
    if name == "qwen3_vl":
        videos, metadata = zip(*videos)
        videos, options["video_metadata"] = list(videos), list(metadata)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompts = dict(processor(text=text, images=images, videos=videos, **options))
    assert prompts["video_grid_thw"].tolist() == [[2, 8, 4], [3, 8, 4]]
    assert prompts["input_ids"].eq(zoo.VIDEO).sum(1).tolist() == [16, 24]
    check_oracle(zoo.build(name), prompts)


def video_turn(frames, seed, images):
    """A user turn with a video of ``frames`` frames of 32 x 16 pixels, and images after it."""
    video = [zoo_processors.picture(32, 16, seed=10 * seed + index) for index in range(frames)]
    turn = zoo_processors.conversation(images, seed, length=24)[0]
    sizes = dict(min_pixels=64, max_pixels=1024)
    turn["content"].insert(1, dict(type="video", video=video, **sizes))
    turn["content"][2:-1] = [part | sizes for part in turn["content"][2:-1]]
    return [turn]


def check_oracle(model, prompts):
    """Decoding on the compressed cache equals a full cache with the evicted entries masked."""
    length, batch = prompts["input_ids"].shape[1], prompts["input_ids"].shape[0]
    cache = mixkv.MixKVCache(model, **SMALL)
    tokens, logits = oracle.generate(model, prompts, STEPS, past_key_values=cache)
    masks = oracle.keep_masks(cache, length, batch)
    assert sum(mask.sum() for mask in masks if mask is not None) == sum(
        mask[:, :, 0].numel() * SMALL["budget"] for mask in masks if mask is not None
    )
    mixkv.unpatch(model)
    full_tokens, full_logits = oracle.generate(model, prompts, STEPS)
    assert torch.equal(logits[:, 0], full_logits[:, 0]), "the first token comes from an uncompressed prefill"
    with oracle.masked(model, masks, length):
        masked_tokens, masked_logits = oracle.generate(model, prompts, STEPS)
    assert (logits - masked_logits).abs().max() <= 1e-4
    assert torch.equal(tokens, masked_tokens)
    assert (masked_logits - full_logits).abs().max() > 1e-3, "nothing that matters was evicted: the test shows nothing"
