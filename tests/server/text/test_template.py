import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from server.errors import ConfigError
from server.text.template import ChatTemplate, TemplateError

MESSAGES = [{"role": "user", "content": "<你好> & 'x'"}, {"role": "assistant", "content": "  yes \n"}]

DIALECT = (
    "{% for m in messages %}\n    {% if m.role == 'user' %}\nU: {{ m.content }}\n    {% endif %}\n{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content | trim }}{% endfor %}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }} {{ messages[0] | tojson(ensure_ascii=True, sort_keys=True) }}",
    "{{ messages[0] | tojson(separators=(',', ':')) }}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[1].content }}{% endgeneration %}{{ x }}",
    "{%- generation -%}  a  {%- endgeneration -%}  b",
    "{% if documents is none and tools is none %}none{% endif %}{{ missing }}|{{ add_generation_prompt }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}\n\n",
    "{{ strftime_now('%Y') }}{{ bos_token }}",
)


@pytest.mark.parametrize("source", DIALECT)
def test_the_dialect_is_that_of_transformers(source):
    variables = {"add_generation_prompt": True, "bos_token": "<s>"}
    expected = render_jinja_template([MESSAGES], chat_template=source, **variables)[0][0]
    assert ChatTemplate(source).render(MESSAGES, **variables) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + none }}", "NoneType"),
        ("{{ messages[0].missing.deeper }}", "missing"),
        ("{{ ().__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
    ],
)
def test_a_template_that_fails_says_why(source, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source).render(MESSAGES)


def write(folder, jinja=None, config=None):
    if jinja is not None:
        (folder / "chat_template.jinja").write_bytes(jinja)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    return folder


NAMED = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("jinja", "config", "text"),
    [(b"J", "C", "J"), (b"J", None, "J"), (None, "C", "C"), (None, NAMED, "D"), (b"a\r\nb", None, "a\nb")],
)
def test_where_the_template_is_read_from(tmp_path, jinja, config, text):
    template = ChatTemplate.load(write(tmp_path, jinja, config))
    assert template is not None
    assert template.render(MESSAGES) == text


def test_a_folder_without_template_has_none(tmp_path):
    assert ChatTemplate.load(tmp_path) is None


@pytest.mark.parametrize(
    ("jinja", "config", "message"),
    [
        (b"a\n{% if %}", None, "broken at line 2"),
        (b"\xff\xfe", None, "not UTF-8"),
        (None, 7, "must be a string or a list"),
        (None, [{"name": "rag", "template": "R"}], "'default'"),
    ],
)
def test_a_damaged_template_is_refused_at_load(tmp_path, jinja, config, message):
    with pytest.raises(ConfigError, match=message):
        ChatTemplate.load(write(tmp_path, jinja, config))
