"""The language model: a LoRA that looks things up on pages; in the second stage with the reader, which learns on."""

from __future__ import annotations

import random
import time
from pathlib import Path

import reading
import torch
from asked import ask, attend
from common import MEETING, READER_PART, TEXT_PART, cosine, log, set_rate
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AttentionInterface

from mixkv.document import page
from mixkv.document.model import LANGUAGE, LORA_SCALE, READER, read, write
from mixkv.evaluation.models import Loaded, load

RANK = 16
PROCESSES = 2
KIND_WEIGHTS = {"form": 3, "table": 5, "receipt": 4, "screen": 5, "two pages": 4}
# A page that is whole takes three times as long as one without its blank cells, which teaches most of what there is to learn.
BARE = 0.7
PEAK = 1e-3
# Every so many steps the reader learns from a page of random cells, so that it forgets no word.
AGAIN = 4

AttentionInterface.register("asked", attend)


def text(steps: int, out: Path) -> None:
    """Pages without their blank cells, of true embeddings and places."""
    torch.manual_seed(1)
    loaded, model = _language()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "peak": PEAK}], weight_decay=0.0)
    embed = loaded.model.get_input_embeddings()
    place = reading.places(embed.weight.float(), loaded.tokenizer).to(embed.weight.dtype)
    told = Told("text", steps)
    for step in range(steps):
        set_rate(optimizer, cosine(step, steps, 30, final=0.5))
        chance = random.Random(f"text {step}")
        document = page.make(_kind(chance), f"text {step}")
        asked = ask(loaded.tokenizer, document, chance, bare=True)
        cells = asked.image >= 0
        embeddings = embed(asked.ids).detach()
        embeddings[cells] += place.repeat(len(document.pages), 1)[asked.image[cells]]
        loss, right = _answers(loaded, asked, embeddings)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        told.add(document.kind, loss, right)
    _save(model, out / TEXT_PART)


def pages(steps: int, out: Path, rank: int) -> None:
    """Goes on with pages as the reader sees them, first without their blank cells, then whole. Process ``rank`` of `PROCESSES`:
    each has its own pages, and gradients are averaged. Writes both parts' weights."""
    torch.manual_seed(1)
    meeting = f"file://{(out / MEETING).resolve()}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    loaded, model = _language()
    set_peft_model_state_dict(model, read(out / TEXT_PART))
    reader = reading.Reader(load(None, dtype="float32").model, loaded.tokenizer).load(out / READER_PART)
    update = [value for value in model.parameters() if value.requires_grad]
    # LLaVA takes what stands before the tower's last norm.
    eyes = [value for name, value in reader.named_parameters() if "post_layernorm" not in name]
    groups = [{"params": update, "peak": PEAK}, {"params": eyes, "peak": 0.3 * PEAK}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    embed = loaded.model.get_input_embeddings()
    told = Told("pages", steps)
    bare = round(BARE * steps)
    for step in range(steps):
        whole = step >= bare
        set_rate(optimizer, cosine(step - bare, steps - bare, 1, first=0.4) if whole else cosine(step, bare, 20, final=0.4))
        # Alike in all processes: they read pages of one kind at a time, and none waits long for another.
        chance = random.Random(f"pages {step}")
        name = f"pages {step * PROCESSES + rank}"
        document = page.make(_kind(chance), name)
        asked = ask(loaded.tokenizer, document, chance, bare=not whole)
        _, found = reader(document.pages, [f"{name} {number}" for number in range(len(document.pages))])
        cells = asked.image >= 0
        embeddings = embed(asked.ids).detach()
        embeddings[cells] = found.flatten(0, 1)[asked.image[cells]].to(embeddings.dtype)
        loss, right = _answers(loaded, asked, embeddings)
        seen = document.pages
        if step % AGAIN == 0:
            seen = [reading.dense_page(random.Random(name))]
            _, found = reader(seen, [name], mixed=True)
        labels = reading.labels_of(seen)
        misread = (reader.distance(found, labels) * reading.weights_of(labels)).sum(-1).mean()
        optimizer.zero_grad()
        (loss + 2 * misread).backward()
        for part in (update, eyes):
            _average(part)
            nn.utils.clip_grad_norm_(part, 1.0)
        optimizer.step()
        if rank == 0:
            told.add(document.kind, loss, right)
    if rank == 0:
        _save(model, out / LANGUAGE)
        reader.save(out / READER)


def _language() -> tuple[Loaded, nn.Module]:
    loaded = load(None, dtype="bfloat16")
    loaded.model.set_attn_implementation("asked")
    wanted = LoraConfig(r=RANK, lora_alpha=int(RANK * LORA_SCALE), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return loaded, get_peft_model(loaded.model, wanted)


def _kind(chance: random.Random) -> str:
    return chance.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]


def _answers(loaded: Loaded, asked, embeddings: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """The loss over all answers, and which are right word by word."""
    states = loaded.model.model(
        inputs_embeds=embeddings[None],
        attention_mask=asked.mask(embeddings.dtype),
        position_ids=asked.positions[None],
        use_cache=False,
        common=int((asked.question == 0).sum()),
    ).last_hidden_state[0]
    predicted = (asked.labels >= 0).nonzero()[:, 0]
    logits = loaded.model.lm_head(states[predicted - 1]).float()
    hit = logits.argmax(-1) == asked.labels[predicted]
    of = asked.question[predicted]
    return nn.functional.cross_entropy(logits, asked.labels[predicted]), [bool(hit[of == one].all()) for one in of.unique()]


def _average(parameters: list[nn.Parameter]) -> None:
    together = torch.cat([value.grad.flatten() for value in parameters])
    torch.distributed.all_reduce(together)
    for value, part in zip(parameters, together.split([value.numel() for value in parameters])):
        value.grad.copy_(part.view_as(value) / PROCESSES)


def _save(model: nn.Module, path: Path) -> None:
    write(path, {name: value.detach().bfloat16().contiguous() for name, value in get_peft_model_state_dict(model).items()})


class Told:
    """A line in a while: the loss, and by kind how many answers were right."""

    def __init__(self, stage: str, steps: int, every: int = 20):
        self.stage, self.steps, self.every = stage, steps, every
        self.started, self.done, self.right = time.perf_counter(), 0, {}

    def add(self, kind: str, loss: torch.Tensor, right: list[bool]) -> None:
        self.done += 1
        self.right.setdefault(kind, []).extend(right)
        if self.done % self.every == 0:
            shares = ", ".join(f"{name} {sum(hits) / len(hits):.2f}" for name, hits in sorted(self.right.items()))
            log(f"{self.stage} {self.done}/{self.steps}: loss {loss.item():.3f}, answers right: {shares}", self.started)
            self.right = {}
