"""The vision example on a tiny model: what it prints is what the model and the cache say."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from support import zoo, zoo_processors

import mixkv

EXAMPLE = Path(__file__).parents[2] / "examples" / "qwen2_vl.py"


def read_images(messages):
    """What qwen_vl_utils does for images, without resizing; the package itself cannot be imported without torchvision."""
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    return [Image.open(part["image"]).convert("RGB") for part in parts], None


@pytest.fixture(params=["stand-in", "qwen_vl_utils"])
def example(request, monkeypatch):
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "qwen_vl_utils", SimpleNamespace(process_vision_info=read_images))
    else:
        zoo_processors.vision_tools()
    spec = importlib.util.spec_from_file_location("qwen2_vl_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_qwen2_vl(example, tmp_path, capsys):
    path = tmp_path / "picture.png"
    zoo_processors.picture(64, 96).save(path)
    model, processor = zoo.build("qwen2_vl"), zoo_processors.build("qwen2_vl")
    example.main(model, processor, str(path), zoo_processors.words(40, seed=1), budget=40)
    prompt, full, compressed, held = capsys.readouterr().out.splitlines()
    columns = int(prompt.split()[1])
    inputs = example.encode(processor, example.conversation(str(path), zoo_processors.words(40, seed=1)))
    assert columns == inputs["input_ids"].shape[1] > 44
    assert inputs["input_ids"].eq(zoo.IMAGE).sum() == inputs["image_grid_thw"].prod() / 4 > 4
    assert full == "full cache: " + example.answer(model, processor, inputs)
    cache = mixkv.MixKVCache(model, budget=40)
    assert compressed == "compressed: " + example.answer(model, processor, inputs, cache)
    assert compressed.split()[1:] != full.split()[2:]
    assert f"({cache.stats()['ratio']:.1%})" in held
