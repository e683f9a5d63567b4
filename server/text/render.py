"""Messages to prompt ids: the one renderer, for serving and for training.

Safe text gives exactly the ids of transformers' `apply_chat_template`; a control token's text inside a message gives
the ids of stock encoding with special tokens split, whatever the role. Knows nothing of HTTP, datasets or the engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.text.guard import ControlGuard, free_marks, texts_of
from server.text.template import ChatTemplate, TemplateError
from server.text.tokenizer import TextError, Tokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TrainingText:
    """A whole conversation. `trained[i]` says whether `token_ids[i]` is an assistant's own text or its stop token."""

    token_ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class _Rendered:
    text: str
    mark: str  # the noncharacter that breaks forged control tokens in `text`

    @property
    def plain(self) -> str:
        return self.text.replace(self.mark, "")


class ChatRenderer:
    """Tokenizer and template of one model folder. Immutable; any thread may render."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._guard = ControlGuard(tokenizer.control_tokens)
        literals = "" if template is None else template.source
        self._taken = "".join([literals, *tokenizer.control_tokens, *tokenizer.special_tokens.values()])
        self.turn_end_id = self._find_turn_end()

    @classmethod
    def load(cls, folder: Path) -> "ChatRenderer":
        """Raises ConfigError with a cure. A folder without a template loads; `template` is then None."""
        return cls(Tokenizer.load(folder), ChatTemplate.load(folder))

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Prompt ids. Raises TextError (bad messages) or TemplateError (the template's refusal)."""
        rendered = self._render(messages, add_generation_prompt, continue_final_message, tools, template_kwargs)
        return self._encode(rendered, messages, tools)

    def render_text(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt for human eyes; forged control tokens look like real ones here. Raises as `render`."""
        return self._render(messages, add_generation_prompt, continue_final_message, tools, template_kwargs).plain

    def render_training(
        self, messages: Messages, *, tools: Sequence[Any] | None = None, **template_kwargs: Any
    ) -> TrainingText:
        """The ids of the whole conversation, and which of them the model itself must learn to say.

        `token_ids` equals `render(messages, add_generation_prompt=False)`, and what stands before an assistant's turn i
        equals `render(messages[:i])`: the prompt the server would have sent. Raises TemplateError, naming the turn, if
        the template breaks that, and TextError if an answer's first characters fuse with the prompt's last token.
        """
        token_ids = self.render(messages, add_generation_prompt=False, tools=tools, **template_kwargs)
        trained = [False] * len(token_ids)
        for turn, message in enumerate(messages):
            if message.get("role") == "assistant":
                start = self._prompt_length(messages, turn, token_ids, tools, template_kwargs)
                end = self._turn_end(token_ids, start, turn)
                trained[start:end] = [True] * (end - start)
        return TrainingText(token_ids, trained)

    def _prompt_length(
        self, messages: Messages, turn: int, token_ids: list[int], tools: Sequence[Any] | None, kwargs: dict[str, Any]
    ) -> int:
        if turn == 0:
            raise TextError("messages[0] is an assistant turn: there is nothing it answers", "messages[0].role")
        prompt_ids = self.render(messages[:turn], tools=tools, **kwargs)
        if token_ids[: len(prompt_ids)] == prompt_ids:
            return len(prompt_ids)
        prompt = self.render_text(messages[:turn], tools=tools, **kwargs)
        if self.render_text(messages, add_generation_prompt=False, tools=tools, **kwargs).startswith(prompt):
            raise TextError(
                f"messages[{turn}].content fuses with the end of the prompt into one token; strip its leading spaces "
                "and newlines",
                f"messages[{turn}].content",
            )
        raise TemplateError(
            f"the chat template renders what stands before messages[{turn}] differently in a prompt and in a finished "
            "conversation, so training on that turn would not match serving; cut the conversation after it"
        )

    def _turn_end(self, token_ids: list[int], start: int, turn: int) -> int:
        """No message can hold the stop token, so the first one after the prompt is the template's."""
        if self.turn_end_id is None or self.turn_end_id not in token_ids[start:]:
            raise TemplateError(f"the chat template writes no stop token after messages[{turn}]")
        return token_ids.index(self.turn_end_id, start) + 1

    def _render(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Any] | None,
        kwargs: dict[str, Any],
    ) -> _Rendered:
        if self.template is None:
            raise TemplateError("this model has no chat template; use /v1/completions, or add chat_template.jinja")
        if not messages:
            raise TextError("messages must not be empty", "messages")
        if continue_final_message and add_generation_prompt:
            raise TextError("continue_final_message and add_generation_prompt exclude each other")
        flat = [_flattened(message, index) for index, message in enumerate(messages)]
        mark, cut = free_marks([text for _, text in _all_texts(flat, tools, kwargs)], self._taken)
        guarded = self._guard.guard(flat, mark)
        if continue_final_message:
            guarded[-1]["content"] = _continued(guarded[-1].get("content"), len(flat) - 1) + cut + " "
        variables = {**self.tokenizer.special_tokens, **self._guard.guard(kwargs, mark)}
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            text = self.template.render(guarded, tools=self._guard.guard(tools, mark), **variables)
        except TemplateError as error:
            raise TemplateError(str(error).replace(mark, "").replace(cut, "")) from error
        return _Rendered(_cut(text, cut) if continue_final_message else text, mark)

    def _encode(self, rendered: _Rendered, messages: Messages, tools: Sequence[Any] | None) -> list[int]:
        try:
            return self.tokenizer.encode_rendered(rendered.text, rendered.mark)
        except TextError:
            for path, text in _all_texts(messages, tools, {}):  # say where, not where in the rendered prompt
                try:
                    self.tokenizer.encode_plain(text)
                except TextError as error:
                    raise TextError(f"{path}: {error}", path) from None
            raise

    def _find_turn_end(self) -> int | None:
        """The control token that the template writes after an assistant's content.

        It ends a chat answer whatever the model's own eos is: a base model's differs, and it would never stop.
        """
        probe = "qloopturnend"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
        try:
            text = self.render_text(messages, add_generation_prompt=False)
        except TemplateError:
            return None
        after = text.rfind(probe) + len(probe)
        found = self.tokenizer.find_control(text, after)
        return found[1] if found and not text[after : found[0]].strip() else None


def _flattened(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message whose content parts are joined into one string, by newlines as vLLM does."""
    if not isinstance(message, Mapping):
        raise TextError(f"messages[{index}] must be an object", f"messages[{index}]")
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    texts = [_part_text(part, f"messages[{index}].content[{n}]") for n, part in enumerate(content)]
    return {**message, "content": "\n".join(texts)}


def _part_text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise TextError(f"{path}.type is {kind!r}; this model reads only 'text' parts", f"{path}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise TextError(f"{path}.text must be a string", f"{path}.text")
    return text


def _all_texts(messages: Messages, tools: Sequence[Any] | None, kwargs: dict[str, Any]) -> list[tuple[str, str]]:
    trees = (("messages", messages), ("tools", tools), ("chat_template_kwargs", kwargs))
    return [found for path, tree in trees for found in texts_of(tree, path)]


def _continued(content: Any, index: int) -> str:
    if not isinstance(content, str):
        path = f"messages[{index}].content"
        raise TextError(f"{path} must be text for continue_final_message", path)
    return content


def _cut(text: str, cut: str) -> str:
    """End the text where the final message's content ends; if the template trimmed it, so is the text."""
    at = text.rfind(cut)
    if at < 0:
        raise TemplateError("the chat template drops the final message, so it cannot be continued")
    return text[:at] if text.startswith(" ", at + 1) else text[:at].rstrip()
