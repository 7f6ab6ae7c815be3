"""An agent that sees a screenshot a step, says where to click, and is asked about earlier screens in the end: full cache against bounded.

pip install 'mixkv[pages]'
python examples/agent_loop.py [--model Qwen/Qwen2.5-VL-7B-Instruct] [--steps 10] [--budget 64] [--turns each]

Without --model: the document model, whose screens have named controls at places A1 to F6. Another model is shown the same screens.
With --turns each, every screen is compressed to --budget KV entries per KV head as it is read; with --turns all, everything held competes
for --budget after each step.
"""

import argparse
import inspect
import random
import time

import torch
from transformers import DynamicCache

import mixkv
from mixkv.cache.stats import held_bytes
from mixkv.document import page, questions, render
from mixkv.evaluation.loading import load
from mixkv.hf.versions import cache_argument

HINT = " Rows are A to F from the top, columns 1 to 6 from the left: answer with a letter and a digit."


class Conversation:
    """A model, a cache and what has been said: every turn is read once, and only its own tokens and images are given to the model."""

    def __init__(self, model, processor, cache):
        self.model, self.processor, self.cache = model, processor, cache
        self.messages, self.said = [], ""
        self.aligned = {"input_ids": torch.empty(1, 0, dtype=torch.long)}
        self.grids = []

    @torch.no_grad()
    def ask(self, question, image=None, tokens=12):
        """The answer to a question, perhaps about an image (PIL)."""
        content = (
            [{"type": "text", "text": question}] if image is None else [{"type": "image"}, {"type": "text", "text": question}]
        )
        self.messages.append({"role": "user", "content": content})
        text = self.processor.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        first = not self.said
        # The cache has read all but the end of the last answer's turn.
        start = 0 if first else text.index(self.answer, len(self.said)) + len(self.answer)
        special = first and not (self.processor.tokenizer.bos_token and text.startswith(self.processor.tokenizer.bos_token))
        images = None if image is None else [image]
        piece = self.processor(images=images, text=[text[start:]], add_special_tokens=special, return_tensors="pt")
        self.said = text
        written = self._generate(dict(piece.to(self.model.device)), tokens)
        self.answer = self.processor.tokenizer.decode(written, skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": self.answer}]})
        return self.answer

    def _generate(self, piece, tokens):
        """Greedy token ids after a piece of the conversation, the end of the turn left out."""
        piece.pop("attention_mask", None)
        for name in {"mm_token_type_ids", "token_type_ids"} & piece.keys():
            self.aligned.setdefault(name, torch.zeros_like(self.aligned["input_ids"]))
        self._append({name: piece[name] for name in self.aligned if name in piece})
        if "image_grid_thw" in piece:
            self.grids.append(piece["image_grid_thw"])
        ends = self.model.generation_config.eos_token_id
        ends, written = ends if isinstance(ends, list) else [ends], []
        unread = self.aligned["input_ids"].shape[1] - self.cache.get_seq_length()
        given = piece | {name: part[:, -unread:] for name, part in self.aligned.items()}
        while len(written) < tokens:
            out = self.model(**given, **self._positions(unread), **cache_argument(self.cache), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(dim=-1)
            if token.item() in ends:
                break
            written.append(token.item())
            self._append({"input_ids": token})
            given, unread = {"input_ids": token}, 1
        return written

    def _append(self, new):
        length = new["input_ids"].shape[1]
        for name, part in self.aligned.items():
            here = new.get(name, torch.zeros(1, length, dtype=part.dtype))
            self.aligned[name] = torch.cat([part.to(here.device), here], dim=1)

    def _positions(self, unread):
        """Of the last ``unread`` tokens, where a model places image tokens in three dimensions (Qwen-VL)."""
        find = getattr(self.model.model, "get_rope_index", None)
        if find is None:
            return {}
        known = dict(self.aligned)
        known["attention_mask"] = torch.ones_like(known["input_ids"])
        known |= {"image_grid_thw": torch.cat(self.grids)} if self.grids else {}
        known = {name: part for name, part in known.items() if name in inspect.signature(find).parameters}
        return {"position_ids": find(**known)[0][..., -unread:]}


def task(steps, seed):
    """Screens, with a control to be found on each; and questions about controls that are on one of the earlier screens alone."""
    screens = [page.make("screen", f"agent {seed} {step}") for step in range(steps)]
    chance = random.Random(f"agent {seed}")
    keys = [{fact.key for fact in screen.facts} for screen in screens]
    actions = [chance.choice(screen.facts) for screen in screens]
    back = []
    for step, screen in enumerate(screens[:-1]):
        alone = [fact for fact in screen.facts if all(fact.key not in other for at, other in enumerate(keys) if at != step)]
        back += [(screen, chance.choice(alone))] if alone else []
    return screens, actions, back


def run(model, processor, cache, screens, actions, back, hint, seed):
    """A line a step, and one for the questions that go back."""
    conversation, right, times = Conversation(model, processor, cache), 0, []
    for step, (screen, action) in enumerate(zip(screens, actions), 1):
        start = time.perf_counter()
        answer = conversation.ask(questions.ask(screen, [action]) + hint, render.draw(screen.pages[0], f"agent {seed} {step}"))
        times.append(time.perf_counter() - start)
        right += answer == action.answer
        held = sum(map(held_bytes, cache.layers)) / 2**20
        print(
            f"step {step:2}: {answer!r:8} ({action.answer}), {cache.get_seq_length():6} tokens, {held:7.1f} MiB, {times[-1]:5.1f} s"
        )
    answers = [conversation.ask(questions.ask(screen, [fact]) + hint) for screen, fact in back]
    later = sum(answer == fact.answer for answer, (_, fact) in zip(answers, back))
    print(
        f"actions right: {right} of {len(screens)}; questions that go back: {later} of {len(back)}; last steps: {times[-1]:.1f} s"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or a folder of a vision-language model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--budget", type=int, default=64, help="KV entries per KV head")
    parser.add_argument("--turns", default="each", choices=["each", "all"])
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    loaded = load(given.model, vision=True)
    model, hint = loaded.model, "" if loaded.knows_pages else HINT
    parts = task(given.steps, given.seed)
    print("full cache")
    run(model, loaded.processor, DynamicCache(config=model.config), *parts, hint, given.seed)
    print(f"bounded: turns={given.turns!r}, budget={given.budget}")
    cache = mixkv.MixKVCache(model, turns=given.turns, budget=given.budget, window=given.window)
    run(model, loaded.processor, cache, *parts, hint, given.seed)


if __name__ == "__main__":
    main()
