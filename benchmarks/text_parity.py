"""Our renderer beside stock transformers, on any model folder with a tokenizer and a chat template.

    python -m benchmarks.text_parity --tokenizer FOLDER [--chats 1000] [--seed 0]

Prints: random chats whose prompt ids equal `apply_chat_template`'s; for every added token, forged conversations that
gained a control token or lost text (both must be 0); load time, memory and speed. Exit status 1 on any difference.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from server.text.render import ChatRenderer

Chat = list[dict[str, Any]]

FRAGMENTS = (
    "你好", "世界。", "我最近总是睡不着，", "怎么办？", "龘靐", "The quick brown fox", "it's", "don't", "x = 3.14159",
    "def f(x):\n    return x", "👩‍👩‍👧", "🇨🇳", "🙂", "e\u0301", "\u1100\u1161\u11a8", "A\u030a", "ﬁ", "Ω", "\u212b",
    "مرحبا", "\u200b", "\ufeff", "\u00a0", "\u3000", " ", "  ", "\t", "\n", "\n\n", "\r\n", "\r", "<", "<|",
    "|>", ">", "|", "{{", "%}", "{% raw %}", "\\n", '"', "'", "\0", "\x7f", "\ufffd", "\U0010ffff", "\ufdd0",
    "0123456789", "<b>html</b>", "&amp;",
)  # fmt: skip
AROUND = ("", "你好", " ", "\n", "a", "e\u0301", "\u0301", "👩‍👩‍👧", "<", "|>", "\u200d", "\ufdd0")


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(FRAGMENTS, k=rng.choice((0, 1, 2, 3, 8, 30))))


def random_chat(rng: random.Random) -> Chat:
    """1 to 9 messages of zh, en, emoji, white space and combining characters, with or without a system message."""
    system = [{"role": "system", "content": random_text(rng)}] if rng.random() < 0.5 else []
    roles = ["user", "assistant"] * rng.randint(1, 4)
    cut = rng.randint(1, len(roles))
    return [*system, *({"role": role, "content": random_text(rng)} for role in roles[:cut])]


def parity_failures(renderer: ChatRenderer, stock: Any, chats: Sequence[Chat]) -> list[Chat]:
    """Chats whose ids differ from stock `apply_chat_template`, with or without the generation prompt."""
    return [
        chat
        for chat in chats
        if any(
            renderer.render(chat, add_generation_prompt=prompted)
            != stock.apply_chat_template(chat, add_generation_prompt=prompted, tokenize=True, return_dict=False)
            for prompted in (True, False)
        )
    ]


def forgeries(token: str, tokens: Sequence[str], rng: random.Random) -> Iterator[tuple[Chat, Chat]]:
    """(forged, harmless) conversations of the same shape; every way of writing the token into a message."""
    half = len(token) // 2
    bodies = [left + token + right for left in AROUND for right in AROUND]
    bodies += [token * 3, token[:half] + token + token[half:], token[:1] + token, token + token[1:], token[:-1]]
    bodies += [token + other for other in tokens] + ["".join(rng.choices([*tokens, *AROUND], k=12)) for _ in range(10)]
    for body in bodies:
        for place in range(3):
            forged = [{"role": role, "content": "ok"} for role in ("system", "user", "assistant")]
            harmless = [dict(message) for message in forged]
            forged[place]["content"] = body
            harmless[place]["content"] = "harmless"
            yield forged, harmless
    parts = [{"type": "text", "text": token[:half]}, {"type": "text", "text": token[half:]}]
    yield [{"role": "user", "content": parts}], [{"role": "user", "content": "harmless"}]


def control_counts(renderer: ChatRenderer, chat: Chat) -> Counter[int]:
    return Counter(filter(renderer.tokenizer.control_ids.__contains__, renderer.render(chat)))


def is_forged(renderer: ChatRenderer, forged: Chat, harmless: Chat) -> bool:
    return control_counts(renderer, forged) != control_counts(renderer, harmless)


def is_altered(renderer: ChatRenderer, stock: Any, chat: Chat) -> bool:
    """Whether the ids spell anything but the rendered text (normalized as the tokenizer does)."""
    normalizer = stock.backend_tokenizer.normalizer
    text = renderer.render_text(chat)
    expected = normalizer.normalize_str(text) if normalizer else text
    return renderer.tokenizer.decode(renderer.render(chat), skip_special_tokens=False) != expected


def resident_mib() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) // 1024


def load(folder: Path) -> ChatRenderer:
    before, began = resident_mib(), time.perf_counter()
    renderer = ChatRenderer.load(folder)
    took = time.perf_counter() - began
    print(f"load                {took:.2f} s, resident {before} -> {resident_mib()} MiB")
    text = "你好，世界。The quick brown fox jumps. " * 2000
    began = time.perf_counter()
    count = len(renderer.render([{"role": "user", "content": text}]))
    print(f"long prompt         {len(text)} characters -> {count} tokens in {time.perf_counter() - began:.3f} s")
    return renderer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="model folder with tokenizer.json")
    parser.add_argument("--chats", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    renderer = load(args.tokenizer)

    from transformers import AutoTokenizer  # after the memory figures, which are the server's without it

    stock = AutoTokenizer.from_pretrained(args.tokenizer)
    rng = random.Random(args.seed)
    differing = parity_failures(renderer, stock, [random_chat(rng) for _ in range(args.chats)])
    print(f"render parity       {args.chats - len(differing)} of {args.chats} chats equal (seed {args.seed})")
    bad = len(differing)
    tokens = list(renderer.tokenizer.control_tokens)
    for token in tokens:
        pairs = list(forgeries(token, tokens, rng))
        forged = sum(is_forged(renderer, *pair) for pair in pairs)
        altered = sum(is_altered(renderer, stock, pair[0]) for pair in pairs)
        bad += forged + altered
        print(f"injection {token:20} {len(pairs)} conversations, forged {forged}, text altered {altered}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
