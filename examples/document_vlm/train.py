"""Trains the document model: a reader of cells, and a LoRA that teaches SmolLM2 to look things up on pages.

    pip install -c constraints.txt -e '.[pages]' peft
    python examples/document_vlm/train.py --out mixkv/document/weights

The reader learns to turn a cell of 36 x 36 pixels into the language model's own embedding of what stands there, and where; at
the same time, on another core, the language model learns to answer about pages whose blank cells are left out, a third of the
tokens; then two processes go on, later with whole pages, the last of them as the reader sees them. Step counts, seeds and
threads are fixed: on one machine and one set of versions the files come out the same.
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mixkv.document import page, questions, render, words
from mixkv.document.model import LANGUAGE, LORA_SCALE, READER, assemble, fill, processor, read, write
from mixkv.evaluation.models import load

READER_STEPS, TEXT_STEPS, PAGE_STEPS = 3000, 300, 480
# Of the reader's pages the first are dense with random cells; then every other one is as pages are, mostly blank.
DENSE = 2 / 3
# So much of the last stage goes on without blank cells, at a third of the time a page; its last pages are seen with the reader's
# eyes.
BARE, SEEN = 5 / 8, 0.13
PROCESSES = 2
RANK = 16
# The language model's after the pages without blanks.
TEXT = "text.safetensors"
KEYS, KEY_WEIGHTS = (1, 2, 3, 4), (2, 3, 2, 2)
KIND_WEIGHTS = {"form": 3, "table": 6, "receipt": 3, "screen": 5, "two pages": 3}
# On a page: more cost little beside the page itself.
QUESTIONS = 12


def reader(steps: int, out: Path) -> None:
    """Cells to embeddings, on pages dense with random cells and then on all kinds of page; a linear head that names the cell
    helps, and is dropped."""
    torch.manual_seed(0)
    loaded = load(None, dtype="float32")
    model = assemble(loaded.model).float()
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    images = processor(loaded.tokenizer).image_processor
    # A cell's place is its row's and its column's, learned together from the first step on.
    rows, columns = nn.init.normal_(torch.empty(2, page.SIDE, tower.config.hidden_size), std=0.2)
    tower.get_parameter("embeddings.position_embedding.weight").data = (rows[:, None] + columns).flatten(0, 1)
    head = nn.Linear(tower.config.hidden_size, len(words.CLASSES))
    ids = torch.tensor([_single(loaded.tokenizer, words.as_token(name)) for name in words.CLASSES])
    embeddings = loaded.model.get_input_embeddings().weight.detach()
    targets, place = embeddings[ids], places(embeddings, loaded.tokenizer)
    scale = targets.square().sum(-1).mean()
    trained = [*tower.parameters(), *projector.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    right = {True: [0, 0], False: [0, 0]}
    started = time.perf_counter()
    first = round(DENSE * steps)
    for step in range(steps):
        if step < first:
            _rate(optimizer, 1e-3, step, first, warm=100)
        else:
            _rate(optimizer, 5e-4, step - first, steps - first, warm=50)
        chance = random.Random(f"reader {step}")
        real = step >= first and step % 2 == 1
        shown = page.make(chance.choice(list(page.KINDS)), f"reader {step}").pages[0] if real else _dense(chance)
        labels = torch.tensor([words.INDEX[cell] for row in shown.cells for cell in row])
        drawn = render.draw(shown, f"reader {step}", mixed=not real and step % 3 > 0)
        seen = images(drawn, return_tensors="pt")["pixel_values"]
        hidden = features(tower, seen)[0]
        found, named = projector(hidden), head(hidden)
        text = torch.tensor([words.CLASSES[label] in words.TEXT for label in labels.tolist()])
        weight = torch.where(text, 3.3, 0.3)
        weight = weight / weight.sum()
        misread = nn.functional.cross_entropy(named, labels, reduction="none")
        distance = (found - targets[labels] - place).square().sum(-1) / scale
        loss = ((misread + 2 * distance) * weight).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            nearest = torch.cdist(found - place, targets).argmin(-1) == labels
        for kind in right:
            right[kind][0] += int(nearest[text == kind].sum())
            right[kind][1] += int((text == kind).sum())
        if (step + 1) % 50 == 0:
            shares = [hits / max(of, 1) for hits, of in (right[True], right[False])]
            _log(
                f"reader {step + 1}/{steps}: loss {loss.item():.3f}, away {distance.mean().item():.3f}, text {shares[0]:.4f}, blank {shares[1]:.4f}",
                started,
            )
            right = {True: [0, 0], False: [0, 0]}
    parts = {"vision_tower": tower, "multi_modal_projector": projector}
    state = {f"{part}.{name}": value.half() for part, module in parts.items() for name, value in module.state_dict().items()}
    write(out / READER, state)


def features(tower, pixel_values: torch.Tensor) -> torch.Tensor:
    """What LLaVA hands its projector [n, SIDE * SIDE, hidden]: the last layer's output, before the tower's last norm."""
    return tower(pixel_values, output_hidden_states=True).hidden_states[-1]


def places(embeddings: torch.Tensor, tokenizer) -> torch.Tensor:
    """What tells the cells' places apart, added to their embeddings: [SIDE * SIDE, hidden].

    A third of a token's norm each: a letter for four rows and a number word for four columns, as positions on screens are
    told; and waves along rows and columns, by which cells below and beside each other are found.
    """
    norm = embeddings.norm(dim=-1).mean()
    letters = [_single(tokenizer, f" {letter}") for letter in "ABCDEF"]
    numbers = [_single(tokenizer, f" {word}") for word in "one two three four five six".split()]
    along = torch.arange(page.SIDE)
    waves = [wave(2 * math.pi * along / period) for period in (24, 12, 6, 3) for wave in (torch.sin, torch.cos)]
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(embeddings.shape[1], 2 * len(waves), generator=generator)).Q.T
    row, column = (torch.stack(waves, -1) @ part / math.sqrt(len(waves)) for part in axes.chunk(2))
    block = along // page.BLOCK

    def unit(vectors: torch.Tensor) -> torch.Tensor:
        return vectors / vectors.norm(dim=-1, keepdim=True)

    row = unit(embeddings[letters])[block] + row
    column = unit(embeddings[numbers])[block] + column
    return norm / 3 * (row[:, None] + column[None]).flatten(0, 1)


def language(steps: int, out: Path, source: Path | None, rank: int = 0) -> None:
    """Answers about pages: without their blank cells; when ``source`` is given, from what was learned there on to whole pages,
    the last of them as the reader there sees them."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    torch.manual_seed(1)
    loaded = load(None, dtype="bfloat16")
    tokenizer, images = loaded.tokenizer, processor(loaded.tokenizer).image_processor
    ranks = 1 if source is None else PROCESSES
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{out.resolve()}/meeting", rank=rank, world_size=ranks)
    wanted = LoraConfig(r=RANK, lora_alpha=int(RANK * LORA_SCALE), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(loaded.model, wanted)
    if source is not None:
        set_peft_model_state_dict(model, read(source / TEXT))
    trained = [value for value in model.parameters() if value.requires_grad]
    peak = 1e-3
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0)
    embed, decoder, head = loaded.model.get_input_embeddings(), loaded.model.model, loaded.model.lm_head
    stage = "text" if source is None else "pages"
    place = places(embed.weight.float(), tokenizer).to(embed.weight.dtype)
    sight, tally = None, {}
    started = time.perf_counter()
    for step in range(steps):
        _rate(optimizer, peak, step, steps, warm=30, final=0.3 if source is None else 0.02)
        name = f"{stage} {step * ranks + rank}"
        # Alike in all processes: they read pages of one kind at a time, and none waits long for another.
        chance = random.Random(f"{stage} {step}")
        kind = chance.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
        document = page.make(kind, name)
        if source is not None and sight is None and step >= (1 - SEEN) * steps:
            sight = _sight(source)
        asked = _asked(tokenizer, document, chance, bare=source is None or step < BARE * steps)
        ids, labels, image = asked.ids, asked.labels, asked.image >= 0
        with torch.no_grad():
            embeddings = embed(ids)
            if sight is not None:
                drawn = [render.draw(one, f"{name} {number}") for number, one in enumerate(document.pages)]
                seen = images(drawn, return_tensors="pt")["pixel_values"]
                hidden = sight.multi_modal_projector(features(sight.vision_tower, seen))
                embeddings[image] = hidden.flatten(0, 1).to(embeddings.dtype)
            else:
                embeddings[image] += place.repeat(len(document.pages), 1)[asked.image[image]]
        states = decoder(
            inputs_embeds=embeddings[None],
            attention_mask=asked.seen[None, None],
            position_ids=asked.positions[None],
            use_cache=False,
        ).last_hidden_state[0]
        predicted = (labels >= 0).nonzero()[:, 0]
        logits = head(states[predicted - 1]).float()
        loss = nn.functional.cross_entropy(logits, labels[predicted])
        optimizer.zero_grad()
        loss.backward()
        if ranks > 1:
            together = torch.cat([value.grad.flatten() for value in trained])
            torch.distributed.all_reduce(together)
            for value, part in zip(trained, together.split([value.numel() for value in trained])):
                value.grad.copy_(part.view_as(value) / ranks)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        hit = logits.argmax(-1) == labels[predicted]
        of = asked.question[predicted]
        whole = [bool(hit[of == number].all()) for number in of.unique()]
        tally.setdefault(kind, []).extend(whole)
        if (step + 1) % 20 == 0 and rank == 0:
            shares = ", ".join(f"{name} {sum(hits) / len(hits):.2f}" for name, hits in sorted(tally.items()))
            _log(f"{stage} {step + 1}/{steps}: loss {loss.item():.3f}, answers right: {shares}", started)
            tally = {}
    if rank > 0:
        return
    state = {name: value.detach().bfloat16().contiguous() for name, value in get_peft_model_state_dict(model).items()}
    write(out / (TEXT if source is None else LANGUAGE), state)


def _sight(source: Path):
    """The reader, with nothing behind it."""
    model = assemble(load(None, dtype="float32").model)
    fill(model, read(source / READER), source / READER)
    return model.model


@dataclass(frozen=True)
class Asked:
    """A document and questions about it, each of which sees the pages and itself: what was said before answers nothing.

    Attributes:
        ids, labels: tokens [n] and what is learned of them, -100 elsewhere.
        image: which cell of the pages, -1 for none [n].
        question: number of the question, from 1 on; 0 for what all see [n].
        positions: as if the whole pages and one question were alone [n].
        seen: [n, n].
    """

    ids: torch.Tensor
    labels: torch.Tensor
    image: torch.Tensor
    question: torch.Tensor
    positions: torch.Tensor
    seen: torch.Tensor


def _asked(tokenizer, document: page.Document, chance: random.Random, bare: bool) -> Asked:
    cells = [cell for one in document.pages for row in one.cells for cell in row]
    shown = [index for index, cell in enumerate(cells) if cell in words.TEXT or not bare]
    ids = tokenizer(questions.USER)["input_ids"]
    first = len(ids)
    ids += [_single(tokenizer, words.as_token(cells[index])) for index in shown]
    image = [-1] * first + shown
    common = len(ids)
    labels, number = [-100] * common, [0] * common
    positions = [*range(first), *(first + index for index in shown)]
    for turn in range(1, QUESTIONS + 1):
        facts = questions.draw_facts(document, chance, chance.choices(KEYS, KEY_WEIGHTS)[0])
        question = questions.ask(document, facts, chance.randrange(4))
        asked = tokenizer(question + questions.END + questions.ASSISTANT)["input_ids"]
        # The line end behind an answer is not the model's to write.
        answered = tokenizer(" " + questions.answer(facts) + questions.END)["input_ids"][:-1]
        length = len(asked) + len(answered)
        ids += asked + answered
        labels += [-100] * len(asked) + answered
        image += [-1] * length
        number += [turn] * length
        positions += range(first + len(cells), first + len(cells) + length)
    of = torch.tensor(number)
    seen = ((of == 0) | (of == of[:, None])).tril()
    return Asked(torch.tensor(ids), torch.tensor(labels), torch.tensor(image), of, torch.tensor(positions), seen)


def _dense(chance: random.Random) -> page.Page:
    """Random cells."""
    dense = page.Page()
    for row in range(page.SIDE):
        for column in range(page.SIDE):
            kind = chance.choices(("word", "digit", "mark", "decoration", "blank"), (60, 14, 6, 8, 12))[0]
            group = {
                "word": words.WORDS,
                "digit": words.DIGITS,
                "mark": words.PUNCTUATION,
                "decoration": list(words.DECORATION),
            }
            blank = words.LINE_END if column == page.SIDE - 1 else words.BLANK
            dense.cells[row][column] = chance.choice(group[kind]) if kind in group else blank
    return dense


def _single(tokenizer, text: str) -> int:
    ids = tokenizer(text)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens: a cell must be one; take it out of mixkv/document/words.py")
    return ids[0]


def _rate(optimizer, peak: float, step: int, steps: int, warm: int, final: float = 0.02) -> None:
    """Linear warm-up, then a cosine down to a share ``final`` of the peak."""
    done = max(step - warm, 0) / max(steps - warm, 1)
    rate = peak * min((step + 1) / warm, final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = rate


def _log(text: str, started: float) -> None:
    print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the weights are written")
    parser.add_argument("--stage", choices=["all", "reader", "text", "pages"], default="all")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help="few steps, to see that it runs and comes out the same twice")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    reader_steps, text_steps, page_steps = (6, 4, 4) if options.short else (READER_STEPS, TEXT_STEPS, PAGE_STEPS)
    if options.stage == "all":
        again = [sys.executable, __file__, "--out", str(options.out), *(["--short"] if options.short else []), "--stage"]
        started = time.perf_counter()
        side_by_side = [subprocess.Popen([*again, stage]) for stage in ("reader", "text")]
        if any([process.wait() for process in side_by_side]):
            sys.exit("a stage failed: see above")
        (options.out / "meeting").unlink(missing_ok=True)
        pair = [subprocess.Popen([*again, "pages", "--rank", str(rank)]) for rank in range(PROCESSES)]
        if any([process.wait() for process in pair]):
            sys.exit("a stage failed: see above")
        _log("all stages done", started)
        return
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Nothing reads memory before it is written; filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if options.stage == "reader":
        reader(reader_steps, options.out)
    elif options.stage == "text":
        language(text_steps, options.out, None)
    else:
        language(page_steps, options.out, options.out, options.rank)


if __name__ == "__main__":
    main()
