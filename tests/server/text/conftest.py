"""Small model folders (tokenizer and template only) and stock transformers beside our renderer."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from server.text.render import ChatRenderer
from tests.models import make_tokenizer

CORPUS = (
    "你好，世界。我最近总是睡不着，怎么办？先别着急，试着每天同一时间上床，睡前一小时放下手机。",
    "你是谁？我是一个助手，可以回答你的问题，也可以陪你聊聊天。今天天气很好，我们去公园走走吧。",
    "The quick brown fox jumps over the lazy dog. It's what they don't say that matters most to us.",
    "You are a helpful assistant. The user asks a question and the assistant answers it as well as it can.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n\n\n🙂🙂🙂 café naïve",
)
CHAT_ML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\nCall these functions:\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
    {{- 'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}{% if message.name %}{{ ' ' + message.name }}{% endif %}{{ '\n' }}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content %}{{ message.reasoning_content }}{% endif %}
        {%- generation %}{{ message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
        {%- endfor %}{% endgeneration %}
    {%- else %}{{ message.content | trim }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def new_text_tokenizer(vocab_size: int = 500) -> Tokenizer:
    """Five added tokens, two of them plain ones as Qwen2 has for tools."""
    return make_tokenizer(CORPUS, vocab_size, ("<tool_call>", "</tool_call>"))


def write_folder(folder: Path, template: str | None, tokenizer: Tokenizer | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or new_text_tokenizer()).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "chatml", CHAT_ML, pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tools_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tools", TOOLS)


@pytest.fixture(scope="session")
def renderer(folder: Path) -> ChatRenderer:
    return ChatRenderer.load(folder)


@pytest.fixture(scope="session")
def tools_renderer(tools_folder: Path) -> ChatRenderer:
    return ChatRenderer.load(tools_folder)


@pytest.fixture(scope="session")
def stock(folder: Path) -> Any:
    return stock_tokenizer(folder)


@pytest.fixture(scope="session")
def tools_stock(tools_folder: Path) -> Any:
    return stock_tokenizer(tools_folder)


def stock_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that writes one more model folder: (template, tokenizer=None, **tokenizer_config) -> path."""

    def make(template: str | None, tokenizer: Tokenizer | None = None, **config: Any) -> Path:
        return write_folder(tmp_path_factory.mktemp("models") / "m", template, tokenizer, **config)

    return make


@pytest.fixture(scope="session")
def new_tokenizer() -> Any:
    return new_text_tokenizer


@pytest.fixture(scope="session")
def load_stock() -> Any:
    return stock_tokenizer
