"""How long a row is for a model. Knows the model's tokenizer and chat template; loads no weights."""

import json
from collections.abc import Callable

from server.store.home import Home
from server.store.model_folder import resolve_model
from server.text.render import ChatRenderer
from server.text.template import TemplateError
from server.text.tokenizer import TextError
from trainer.data.rows import Row


def token_counter(model: str, home: Home) -> Callable[[Row], int]:
    """A function that gives a row's tokens: the conversation as it is rendered, or else its texts one by one."""
    renderer = ChatRenderer.load(resolve_model(model, home, with_weights=False))

    def of_texts(row: Row) -> int:
        texts = [row.text, *(str(message["content"]) for message in row.messages), row.chosen]
        return sum(len(renderer.tokenizer.encode_plain(text)) for text in texts)

    def count(row: Row) -> int:
        if not row.messages or renderer.template is None:
            return of_texts(row)
        messages = list(row.messages)
        if row.chosen:
            messages.append({"role": "assistant", "content": row.chosen})
        try:
            tools = json.loads(row.tools) if row.tools else None
            return len(renderer.render(messages, add_generation_prompt=False, tools=tools))
        except (TemplateError, TextError, ValueError, RecursionError):
            return of_texts(row)  # a conversation that this template cannot say, or tools that are no JSON

    return count
