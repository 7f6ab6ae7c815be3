"""The model ``mixkv`` of lm_eval, on local tasks with a tiny model, and through its command line on SmolLM2."""

import json
import re
import sys

import pytest
import torch
from support.text_models import make_model, make_text, make_tokenizer

pytest.importorskip("lm_eval", reason="needs mixkv[harness]")

import lm_eval
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import mixkv
from mixkv.evaluation import loading, prompts
from mixkv.harness import questions
from mixkv.harness.lm import MixKVLM
from mixkv.hf.versions import cache_argument

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
ANSWER = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: answer
generation_kwargs:
  until: ["w60"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: word_perplexity
"""


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_model(eos_token_id=0).save_pretrained(path)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "[UNK]"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Prompts of 100 to 160 tokens, two choices or a free answer."""
    path = tmp_path_factory.mktemp("tasks")
    lines = [
        {"text": make_text(100 + 20 * index), "choices": [f"w{index} w3 w9", f"w{index + 7}"], "answer": index % 2}
        for index in range(4)
    ]
    write_task(path, "choose", CHOICE, lines)
    write_task(path, "answer", ANSWER, [{**line, "answer": "w1"} for line in lines])
    write_task(path, "rolling", ROLLING, [{"text": line["text"]} for line in lines])
    return path


def write_task(path, name, template, lines):
    data = path / f"{name}.json"
    data.write_text("\n".join(map(json.dumps, lines)))
    (path / f"{name}.yaml").write_text(template.format(name=name, data=data))


def evaluate(model, folder, tasks, names, arguments="", **options):
    return lm_eval.simple_evaluate(
        model=model,
        model_args=f"pretrained={folder}{arguments}",
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )


def responses(results, task):
    """What the model gave for every document: texts, or log-likelihoods with whether they are greedy."""
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def likelihoods(results):
    return torch.tensor([[float(pair[0][0]) for pair in document] for document in responses(results, "choose")])


@pytest.fixture(scope="module")
def plain(folder, tasks):
    return evaluate("hf", folder, tasks, ["choose", "answer"])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_budget_beyond_the_prompt_is_plain_hf(folder, tasks, plain, batch, caplog):
    ours = evaluate("mixkv", folder, tasks, ["choose", "answer"], ",budget=400", batch_size=batch)
    torch.testing.assert_close(likelihoods(ours), likelihoods(plain), atol=1e-4, rtol=1e-5)
    assert responses(ours, "answer") == responses(plain, "answer")
    assert ours["results"]["choose"]["acc,none"] == plain["results"]["choose"]["acc,none"]
    held = ours["config"]["mixkv"]["held"]
    assert held["compressed"] == 0 and held["rows_per_head"] == pytest.approx(held["tokens"])
    assert "compressed none of the prompts" in caplog.text


@pytest.mark.parametrize("batch", [1, 3])
def test_prompts_are_compressed(folder, tasks, plain, batch, caplog):
    ours = evaluate(
        "mixkv", folder, tasks, ["choose", "answer"], ",method=adakv,score=mix,budget=20,window=8", batch_size=batch
    )
    described = ours["config"]["mixkv"]
    assert (described["method"], described["score"], described["budget"], described["window"]) == ("adakv", "mix", 20, 8)
    held = described["held"]
    assert held["caches"] == held["compressed"] == 4 + -(-4 // batch)
    # A generation's cache holds the up to eight answer tokens besides the budget.
    assert 20 <= held["rows_per_head"] <= 28 and held["bytes_ratio"] < 0.5
    assert (likelihoods(ours) - likelihoods(plain)).abs().min() > 1e-6
    assert "compressed none" not in caplog.text
    json.dumps(described)


def test_generation_is_that_of_a_patched_model(folder, tasks):
    ours = evaluate("mixkv", folder, tasks, ["answer"], ",budget=20,window=8,kv_backend=torch")
    model, tokenizer = make_model(eos_token_id=0), make_tokenizer()
    mixkv.patch(model, budget=20, window=8)
    for sample in ours["samples"]["answer"]:
        ids = tokenizer(sample["doc"]["text"], return_tensors="pt")
        new = model.generate(input_ids=ids.input_ids, max_new_tokens=8, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(new).split("w60")[0]


def test_likelihoods_step_by_step(folder, tasks):
    """The context but its last token is compressed; that token and the continuation follow one at a time."""
    ours = evaluate("mixkv", folder, tasks, ["choose"], ",budget=20,window=8")
    model, tokenizer = make_model(), make_tokenizer()
    for sample in ours["samples"]["choose"]:
        for choice, response in zip(sample["doc"]["choices"], sample["resps"]):
            context, continuation = (tokenizer(text)["input_ids"] for text in (sample["doc"]["text"], choice))
            cache = mixkv.MixKVCache(model, budget=20, window=8)
            total, greedy = 0.0, True
            with torch.no_grad():
                model(input_ids=torch.tensor([context[:-1]]), past_key_values=cache)
                assert cache.stats()["rows"] == 2 * 2 * 20
                for fed, wanted in zip([context[-1], *continuation], continuation):
                    logs = model(input_ids=torch.tensor([[fed]]), past_key_values=cache).logits[0, -1].log_softmax(-1)
                    total += logs[wanted].item()
                    greedy &= int(logs.argmax()) == wanted
            assert float(response[0][0]) == pytest.approx(total, abs=1e-4)
            assert str(response[0][1]) == str(greedy)


@pytest.mark.parametrize(
    ("context", "continuation", "same"), [([5], [3, 4, 9], True), (list(range(1, 60)) * 10, [7], True), ([], [1] * 600, False)]
)
def test_short_and_long_contexts(folder, context, continuation, same):
    """A context of one token has nothing to compress, one beyond the model's length loses its beginning, as in ``hf``."""
    from lm_eval.models.huggingface import HFLM

    ours = MixKVLM(str(folder), device="cpu", budget=1000)
    request = [(("", ""), context, continuation)]
    if not same:
        with pytest.raises(ValueError, match="600 tokens leaves no room.*512"):
            ours._loglikelihood_tokens(request, disable_tqdm=True)
        return
    expected = HFLM(str(folder), device="cpu")._loglikelihood_tokens(request, disable_tqdm=True)
    found = ours._loglikelihood_tokens(request, disable_tqdm=True)
    assert found[0] == (pytest.approx(expected[0][0], abs=1e-4), expected[0][1])


def test_rolling_likelihood_is_refused(folder, tasks):
    with pytest.raises(NotImplementedError, match="rolling requests the likelihood of whole texts"):
        evaluate("mixkv", folder, tasks, ["rolling"], ",budget=64")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("budget=many", "budget='many'"),
        ("budget=16", "budget=16 must exceed window=32"),
        ("budget=1e2", "budget=100.0"),
        ("method=snap", "'snap'"),
        ("score=mixed", "'mixed'"),
        ("kv_backend=cuda", "unknown backend 'cuda'"),
        ("backend=native", "kv_backend=native"),
        ("method=sparsemm", "needs profile="),
    ],
)
def test_bad_options_are_named(folder, arguments, words):
    with pytest.raises(ValueError, match=words):
        MixKVLM.create_from_arg_string(f"pretrained={folder},{arguments}", {"device": "cpu"})


@pytest.mark.parametrize("given", [("0.25", "8", "none", "False"), (0.25, 8, None, False)])
def test_options_come_typed_or_as_text(folder, given):
    names = ("budget", "window", "decode_budget", "offload")
    config = MixKVLM(str(folder), device="cpu", **dict(zip(names, given))).kv_config
    assert [getattr(config, name) for name in names] == [0.25, 8, None, False] and isinstance(config.window, int)


def test_an_unknown_option_is_not_swallowed(folder):
    with pytest.raises(TypeError, match="bugdet"):
        MixKVLM.create_from_arg_string(f"pretrained={folder},bugdet=64", {"device": "cpu"})


@pytest.mark.usefixtures("needs_smollm2")
def test_command_line_on_smollm2(tmp_path, monkeypatch):
    """`python -m mixkv.harness`, the arguments being those of lm_eval."""
    from mixkv.harness.__main__ import main

    loaded = loading.load(device="cpu")
    loaded.model.save_pretrained(tmp_path / "smollm2")
    loaded.tokenizer.save_pretrained(tmp_path / "smollm2")
    text = prompts.demo().text
    middle = text.index("By the way")
    prompt = f"{text[middle - 700 : middle + 600]}\n\n{prompts.demo().question}"
    write_task(tmp_path, "soup", ANSWER, [{"text": prompt, "answer": "honey"}])
    arguments = {
        "model": "mixkv",
        "model_args": f"pretrained={tmp_path / 'smollm2'},method=adakv,score=mix,budget=128",
        "tasks": "soup",
        "include_path": tmp_path,
        "gen_kwargs": "max_gen_toks=16",
        "device": "cpu",
        "output_path": tmp_path / "out.json",
    }
    flags = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *flags, "--log_samples", "--apply_chat_template"])
    main()
    (results,) = tmp_path.glob("out_*.json")
    (samples,) = tmp_path.glob("samples_soup_*.jsonl")
    held = json.loads(results.read_text())["config"]["mixkv"]["held"]
    assert held["compressed"] == held["caches"] == 1
    assert held["tokens"] > 300 and 128 <= held["rows_per_head"] <= 144
    assert "honey" in json.loads(samples.read_text())["resps"][0][0]


@pytest.fixture(scope="module")
def with_lines(folder, tmp_path_factory):
    """The tiny model with a tokenizer that knows the end of a line, and a task of prompts with a question of one line."""
    path = tmp_path_factory.mktemp("lines")
    make_model(eos_token_id=0).save_pretrained(path)
    tokenizer = make_tokenizer()
    words = tokenizer.get_vocab()
    core = Tokenizer(
        models.WordLevel({**{word: index for word, index in words.items() if word != "w60"}, "\n": words["w60"]}, "[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[UNK]", eos_token="[UNK]")
    tokenizer.save_pretrained(path)
    lines = [{"text": make_text(80 + 20 * index).replace("w60", "w1") + " \n w5 w6 w7", "answer": "w1"} for index in range(4)]
    write_task(path, "later", ANSWER.replace("w60", "w59"), lines)
    return path


@pytest.mark.parametrize("batch", [1, 4])
def test_a_question_of_the_last_line_comes_after_compression(with_lines, batch):
    arguments = ",budget=20,window=8,question_lines=1,kv_backend=torch"
    ours = evaluate("mixkv", with_lines, with_lines, ["later"], arguments, batch_size=batch)
    model, tokenizer = make_model(eos_token_id=0), AutoTokenizer.from_pretrained(with_lines)
    assert ours["config"]["mixkv"]["held"]["compressed"] == 4
    for sample in ours["samples"]["later"]:
        ids = tokenizer(sample["doc"]["text"], return_tensors="pt").input_ids
        cache = mixkv.MixKVCache(model, budget=20, window=8, backend="torch")
        with torch.no_grad():
            model(input_ids=ids[:, :-3], **cache_argument(cache))
        new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **cache_argument(cache))[0, ids.shape[1] :]
        assert sample["resps"][0][0].strip() == re.split(r"w59|\[UNK\]", tokenizer.decode(new))[0].strip()


@pytest.mark.parametrize(
    ("parts", "lines", "context"),
    [
        (["a", "\n", "b", "c"], 1, 2),
        (["a", "\n", "b", "\n", "c"], 2, 2),
        (["a", "\n\n", "b", "\n", "\n"], 1, 2),
        (["a", ".\n", "b\nc", "d"], 1, 3),
        (["a", "\n", "b", ".\n"], 1, 2),
    ],
)
def test_where_a_question_begins(parts, lines, context):
    assert questions.start(list(range(len(parts))), Parts(parts), lines) == context


def test_a_prompt_without_a_context_is_refused():
    with pytest.raises(ValueError, match="question_lines=1 needs prompts"):
        questions.start([0, 1], Parts(["a", "b"]), 1)
    with pytest.raises(ValueError, match="question_lines='x'"):
        MixKVLM("model", question_lines="x")


class Parts:
    """Stands for a tokenizer: token i is the i-th of ``parts``."""

    def __init__(self, parts):
        self.parts = parts

    def decode(self, token):
        return self.parts[token]
