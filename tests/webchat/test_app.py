"""The page's WSGI application, called the way a WSGI server calls it."""

import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.webchat.wsgi_client import Reply, get
from webchat.app import CONTENT_SECURITY_POLICY, HERE, create_app

STATIC_FILES = sorted(p.relative_to(HERE).as_posix() for p in (HERE / "static").rglob("*") if p.is_file())


def read_locale(name: str) -> dict[str, str]:
    texts: dict[str, str] = json.loads((HERE / "i18n" / name).read_text("utf-8"))
    return texts


def test_shell_is_html_with_the_strict_policy() -> None:
    reply = get("/")
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=UTF-8"
    assert reply.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert "<title>qloop</title>" in reply.text


def test_policy_allows_nothing_inline_evaluated_or_foreign() -> None:
    directives = dict(part.split(" ", 1) for part in CONTENT_SECURITY_POLICY.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["frame-ancestors"] == "'none'"
    assert directives["require-trusted-types-for"] == "'script'"
    sources = {source for value in directives.values() for source in value.split()}
    assert sources == {"'none'", "'self'", "'script'"}


def test_shell_has_no_inline_script_style_or_handler_and_only_relative_addresses() -> None:
    html = get("/").text
    assert re.findall(r"<script(?![^>]* src=)", html) == []
    assert "<style" not in html
    assert re.findall(r"\s(?:style|on\w+)=", html) == []
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', html)
    assert len(addresses) >= 4
    assert [a for a in addresses if a.startswith("/") or ":" in a] == []


@pytest.mark.parametrize("path", STATIC_FILES)
def test_every_static_file_is_served_with_a_type_that_nosniff_accepts(path: str) -> None:
    reply = get(f"/{path}")
    expected = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}[Path(path).suffix]
    assert reply.status == 200
    assert reply.headers["content-type"].split(";")[0] == expected
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.body == (HERE / path).read_bytes()


@pytest.mark.parametrize("path", STATIC_FILES)
def test_no_file_names_a_foreign_address_or_a_markup_sink(path: str) -> None:
    text = (HERE / path).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"https?://|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text) == []
    assert "randomUUID" not in text  # undefined on plain http


def test_unchanged_file_is_answered_304() -> None:
    etag = get("/static/css/chat.css").headers["etag"]
    assert get("/static/css/chat.css", {"HTTP_IF_NONE_MATCH": etag}).status == 304


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..\\app.py",
        "/static/js/../../app.py",
        "/static/../static/../views/index.html",
        "/static//etc/passwd",
        "/static/../../../../../../../../etc/passwd",
        "/static/i18n/../en.json",
        "/static/i18n/../../app.py",
        "/static/js",
        "/static/",
        "/static/missing.js",
        "/static/i18n/fr.json",
        "/views/index.html",
        "/app.py",
        "/static/js/chat.js\0.css",
    ],
)
def test_anything_outside_is_refused_without_a_word_about_it(path: str) -> None:
    reply = get(path)
    assert reply.status in {403, 404}
    assert reply.headers["content-type"] == "text/plain; charset=UTF-8"
    assert reply.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert re.fullmatch(r"40[34] [A-Z][A-Za-z ]+\n", reply.text)


def test_other_methods_are_refused() -> None:
    assert get("/", {"REQUEST_METHOD": "POST"}).status == 405
    assert get("/", {"REQUEST_METHOD": "HEAD"}) == Reply(200, get("/").headers, b"")


def test_works_under_a_mount_point() -> None:
    from a2wsgi import WSGIMiddleware
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = Starlette(routes=[Mount("/llm", app=WSGIMiddleware(create_app()))])
    client = TestClient(app)
    assert client.get("/llm/").status_code == 200
    assert client.get("/llm/static/js/chat.js").status_code == 200
    assert client.get("/llm/static/i18n/en.json").json() == read_locale("en.json")


def test_applications_are_independent() -> None:
    assert create_app() is not create_app()


def test_locales_have_the_same_keys_and_placeholders() -> None:
    chinese, english = read_locale("zh-CN.json"), read_locale("en.json")
    assert list(chinese) == list(english)
    for key, text in chinese.items():
        assert text.strip() and english[key].strip(), key
        assert re.findall(r"\{\w+\}", text) == re.findall(r"\{\w+\}", english[key]), key
    assert [key for key, text in chinese.items() if text == english[key]] == []


def test_every_text_the_page_asks_for_exists_and_none_is_left_over() -> None:
    html = (HERE / "views" / "index.html").read_text("utf-8")
    scripts = "".join(p.read_text("utf-8") for p in (HERE / "static" / "js").glob("*.js"))
    asked = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', html))
    asked |= set(re.findall(r'\bt\("(\w+)"', scripts)) | set(re.findall(r'"(error_\w+)"', scripts))
    asked |= {f"{role}_avatar" for role in re.findall(r'#addTurn\("(\w+)"\)', scripts)}
    assert asked == set(read_locale("en.json"))
