"""The language model: a LoRA that looks things up on pages, as texts with places first and then as the reader sees them."""

from __future__ import annotations

import random
import time
from pathlib import Path

import reading
import torch
from asked import Asked, ask, attend
from common import MEETING, TEXT_PART, cosine, log, set_rate
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AttentionInterface

from mixkv.document import page
from mixkv.evaluation.document_model import LANGUAGE, LORA_SCALE, READER, read, write
from mixkv.evaluation.loading import Loaded, load

RANK = 16
PROCESSES = 2
KIND_WEIGHTS = {"form": 3, "table": 5, "receipt": 4, "screen": 5, "two pages": 4}
# Of the last stage: up to here pages are as in the stage before, from here on as the reader sees them, and then whole. A whole page
# takes three times as long as one without its blank cells, which teaches most of what there is to learn; and what is learned of
# exact embeddings is hardly learned of the reader's, but goes over to them.
SEEN, WHOLE = 0.5, 0.7
PEAK = 1e-3

AttentionInterface.register("asked", attend)


def text(steps: int, out: Path) -> None:
    """Pages without their blank cells, of true embeddings and places."""
    torch.manual_seed(1)
    loaded, model = _language()
    optimizer = _optimizer(model)
    place, report = _places(loaded), Log("text", steps)
    for step in range(steps):
        set_rate(optimizer, PEAK * cosine(step, steps, 30, final=0.5))
        chance = random.Random(f"text {step}")
        document = page.make(_kind(chance), f"text {step}")
        loss, right = _answers(loaded, ask(loaded.tokenizer, document, chance, bare=True), place)
        _learn(optimizer, loss)
        report.add(document.kind, loss, right)
    _save(model, out / TEXT_PART)


def pages(steps: int, out: Path, rank: int) -> None:
    """Goes on, later with pages as the reader sees them, at last with whole ones. Process ``rank`` of `PROCESSES`: each has its own
    pages, and gradients are averaged."""
    torch.manual_seed(1)
    meeting = f"file://{(out / MEETING).resolve()}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    loaded, model = _language()
    set_peft_model_state_dict(model, read(out / TEXT_PART))
    reader = reading.Reader(load(None, dtype="float32").model, loaded.tokenizer).load(out / READER)
    optimizer = _optimizer(model)
    place, report = _places(loaded), Log("pages", steps)
    seen, whole = round(SEEN * steps), round(WHOLE * steps)
    for step in range(steps):
        last = step >= whole
        share = cosine(step - whole, steps - whole, 1, first=0.4) if last else cosine(step, whole, 20, final=0.4)
        set_rate(optimizer, PEAK * share)
        # Alike in all processes: they read pages of one kind at a time, and none waits long for another.
        chance = random.Random(f"pages {step}")
        name = f"pages {step * PROCESSES + rank}"
        document = page.make(_kind(chance), name)
        cells = None
        if step >= seen:
            with torch.no_grad():
                _, cells = reader(document.pages, [f"{name} {number}" for number in range(len(document.pages))])
        loss, right = _answers(loaded, ask(loaded.tokenizer, document, chance, bare=not last), place, cells)
        _learn(optimizer, loss, together=True)
        if rank == 0:
            report.add(document.kind, loss, right)
    if rank == 0:
        _save(model, out / LANGUAGE)


def _language() -> tuple[Loaded, nn.Module]:
    loaded = load(None, dtype="bfloat16")
    loaded.model.set_attn_implementation("asked")
    wanted = LoraConfig(r=RANK, lora_alpha=int(RANK * LORA_SCALE), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return loaded, get_peft_model(loaded.model, wanted)


def _kind(chance: random.Random) -> str:
    return chance.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]


def _places(loaded: Loaded) -> torch.Tensor:
    embeddings = loaded.model.get_input_embeddings().weight
    return reading.places(embeddings.float(), loaded.tokenizer).to(embeddings.dtype)


def _answers(
    loaded: Loaded, asked: Asked, place: torch.Tensor, cells: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[bool]]:
    """The loss over all answers, and which are right word by word. ``cells``: the reader's embeddings of all cells; None: the true
    ones with ``place``."""
    embeddings = loaded.model.get_input_embeddings()(asked.ids).detach()
    image = asked.image >= 0
    which = asked.image[image]
    if cells is None:
        embeddings[image] += place[which % len(place)]
    else:
        embeddings[image] = cells.flatten(0, 1)[which].to(embeddings.dtype)
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


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=PEAK, weight_decay=0.0)


def _learn(optimizer: torch.optim.Optimizer, loss: torch.Tensor, together: bool = False) -> None:
    """One step; ``together``: of gradients averaged over the processes."""
    trained = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward()
    if together:
        _average(trained)
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


def _average(parameters: list[nn.Parameter]) -> None:
    together = torch.cat([value.grad.flatten() for value in parameters])
    torch.distributed.all_reduce(together)
    for value, part in zip(parameters, together.split([value.numel() for value in parameters])):
        value.grad.copy_(part.view_as(value) / PROCESSES)


def _save(model: nn.Module, path: Path) -> None:
    write(path, {name: value.detach().bfloat16().contiguous() for name, value in get_peft_model_state_dict(model).items()})


class Log:
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
