"""The model ``mixkv`` of lmms_eval on a local task: images, a tiny LLaVA and lmms_eval's own class for it."""

import json

import pytest
from support import zoo

pytest.importorskip("lmms_eval", reason="needs mixkv[lmms]")

from lmms_eval import evaluator
from lmms_eval import models as registry
from lmms_eval.tasks import TaskManager
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from mixkv.harness.lmms import MixKVLMM

TASK = """
task: look
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.image
doc_to_text: !function functions.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image


def image(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
TOKENS = 9 + 60  # of the image and the question


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    zoo.build("llava").save_pretrained(path)
    words = [f"w{index}" for index in range(zoo.VOCAB - 1)] + ["<image>"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="w3", pad_token="w0", eos_token=f"w{zoo.EOS}", additional_special_tokens=["<image>"]
    )
    images = CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    lines = []
    for index in range(3):
        Image.effect_noise((24, 24), 40 + 60 * index).save(path / f"{index}.png")
        question = " ".join(f"w{4 + (index * 31 + word * 7) % 110}" for word in range(60))
        lines.append({"image": str(path / f"{index}.png"), "question": question, "answer": "w5"})
    data = path / "data.json"
    data.write_text("\n".join(map(json.dumps, lines)))
    (path / "functions.py").write_text(FUNCTIONS)
    (path / "look.yaml").write_text(TASK.format(data=data))
    return path


def evaluate(model, folder, tasks, arguments=""):
    """The answers, in the order of the documents, and the model."""
    arguments = f"pretrained={folder},device_map=cpu{arguments}"
    made = registry.get_model(model).create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})
    results = evaluator.simple_evaluate(
        model=made,
        tasks=["look"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["look"], key=lambda sample: sample["doc_id"])
    return [str(sample["filtered_resps"]) for sample in samples], made


@pytest.fixture(scope="module")
def plain(folder, tasks):
    return evaluate("llava_hf", folder, tasks)[0]


def test_a_budget_beyond_the_prompt_is_the_plain_model(folder, tasks, plain):
    answers, model = evaluate("mixkv", folder, tasks, ",base=llava_hf,budget=400")
    assert answers == plain and len(set(plain)) > 1
    held = model.tally.report()
    assert (held["caches"], held["compressed"]) == (3, 0)
    assert held["rows_per_head"] == held["tokens"] >= TOKENS
    assert "compressed none" in model.tally.warning(400)


def test_prompts_are_compressed(folder, tasks, plain):
    answers, model = evaluate("mixkv", folder, tasks, ",base=llava_hf,method=snapkv,score=mix,budget=12,window=4")
    assert (model.kv_config.method, model.kv_config.budget, model.kv_config.window) == ("snapkv", 12, 4)
    held = model.tally.report()
    assert (held["caches"], held["compressed"]) == (3, 3)
    # The budget, and the up to five answer tokens that are fed back.
    assert 12 <= held["rows_per_head"] <= 17 and held["tokens"] >= TOKENS
    assert answers != plain


def test_a_generation_that_fails_is_not_an_empty_answer(folder, tasks):
    """lmms_eval's llava_hf logs the error and goes on."""
    with pytest.raises(RuntimeError, match="3 generations failed.*use_cache=False"):
        evaluate("mixkv", folder, tasks, ",base=llava_hf,budget=64,use_cache=False")


def test_scoring_is_refused(folder):
    arguments = f"pretrained={folder},device_map=cpu,base=llava_hf,budget=64"
    with pytest.raises(NotImplementedError, match="output_type loglikelihood"):
        MixKVLMM.create_from_arg_string(arguments, {"device": "cpu"}).loglikelihood([])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("budget=64", "base= is missing"),
        ("base=llava_hf,budget=many", "budget='many'"),
        ("base=llava_hf,method=snap", "'snap'"),
        ("base=nothing", "'nothing' not found"),
    ],
)
def test_bad_options_are_named(folder, arguments, words):
    with pytest.raises(ValueError, match=words):
        MixKVLMM.create_from_arg_string(f"pretrained={folder},{arguments}", {"device": "cpu"})
