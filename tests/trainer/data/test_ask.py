"""Labels and new rows from a model, against a real HTTP server that speaks OpenAI's form and misbehaves on purpose."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.services import MODEL, Service
from trainer.__main__ import main
from trainer.data import ask

Reply = Callable[[list[dict[str, str]], int], "tuple[int, str]"]  # messages, number of the call -> status, content


class ModelServer:
    """Answers chat completions with what `reply` says; remembers the requests and how many were open at once."""

    def __init__(self) -> None:
        self.reply: Reply = lambda messages, call: (200, "{}")
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.most_open = 0
        self._open = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # self is the handler below
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server._open += 1
                    server.most_open = max(server.most_open, server._open)
                    server.requests.append(body)
                    server.keys.append(self.headers["Authorization"])
                    call = len(server.requests)
                status, content = server.reply(body["messages"], call)
                with server._lock:
                    server._open -= 1
                message = {"role": "assistant", "content": content}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                done = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
                wrong = {"error": {"message": content, "type": "t", "code": None, "param": None}}
                data = json.dumps(done if status == 200 else wrong).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ModelServer()
    yield server
    server.close()


def write(path: Path, questions: list[str]) -> Path:
    rows = [{"instruction": question, "output": f"答：{question}"} for question in questions]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def label(model: ModelServer, raw: Path, output: Path, *more: str) -> int:
    given = ["--labels", "内科,外科", "--url", model.url, "--model", "m", "--output", str(output)]
    return main(["data", "label", str(raw), *given, *more])


def department(messages: list[dict[str, str]], call: int) -> tuple[int, str]:
    """A model that does as it is told: 刀 is for surgeons."""
    text = json.loads(messages[1]["content"])["text"]
    return 200, json.dumps({"label": "外科" if "刀" in text else "内科"}, ensure_ascii=False)


def test_every_row_gets_its_label_in_its_order(tmp_path: Path, model: ModelServer) -> None:
    questions = [f"第{n}个{'刀' if n % 3 == 0 else '药'}" for n in range(40)]
    model.reply = department
    assert label(model, write(tmp_path / "raw.json", questions), tmp_path / "out.jsonl", "--concurrency", "3") == 0
    rows = read(tmp_path / "out.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == questions
    assert [row["label"] for row in rows] == ["内科" if n % 3 else "外科" for n in range(40)]
    assert len(model.requests) == 40 and 1 <= model.most_open <= 3
    assert {request["temperature"] for request in model.requests} == {0.0}
    assert '["内科", "外科"]' in model.requests[0]["messages"][0]["content"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.rejects.jsonl", "raw.json"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("内科", "not JSON"),
        ("", "empty"),
        ('["内科"]', "not a JSON object"),
        ('{"label": "儿科"}', "not one of the list"),
        ('{"label": ["内科"]}', "not one of the list"),
    ],
)
def test_an_unusable_answer_is_asked_for_again_with_the_reason(
    tmp_path: Path, model: ModelServer, said: str, reason: str
) -> None:
    model.reply = lambda messages, call: (200, said if len(messages) == 2 else '```json\n{"label": "内科"}\n```')
    assert label(model, write(tmp_path / "raw.json", ["问"]), tmp_path / "out.jsonl") == 0
    assert read(tmp_path / "out.jsonl")[0]["label"] == "内科"
    again = model.requests[1]["messages"]
    assert again[2] == {"role": "assistant", "content": said} and reason in again[3]["content"]


def test_a_row_without_a_usable_answer_is_named_and_asked_about_again_next_time(
    tmp_path: Path, model: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, output = write(tmp_path / "raw.json", ["好", "坏", "好好"]), tmp_path / "out.jsonl"
    model.reply = lambda messages, call: (200, "?") if "坏" in messages[1]["content"] else department(messages, call)
    assert label(model, raw, output, "--tries", "2") == 0
    assert [row["messages"][0]["content"] for row in read(output)] == ["好", "好好"]
    (line,) = read(tmp_path / "out.rejects.jsonl")
    assert (line["line"], line["action"], line["code"]) == (2, "dropped", "no-valid-answer")
    assert "2 tries" in line["detail"] and "坏" not in line["detail"]
    assert len(model.requests) == 4
    model.reply = department
    assert label(model, raw, output, "--tries", "2") == 0
    assert len(model.requests) == 5 and len(read(output)) == 3  # only the bad one was asked about
    assert "2 answers of an earlier call" in capsys.readouterr().err


def test_a_stopped_command_goes_on_where_it_was(
    tmp_path: Path, model: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, output = write(tmp_path / "raw.json", [f"问{n}" for n in range(20)]), tmp_path / "out.jsonl"
    model.reply = lambda messages, call: department(messages, call) if call <= 8 else (401, "no such key")
    assert label(model, raw, output, "--concurrency", "1") == 1
    told = capsys.readouterr().err
    assert "HTTP 401" in told and "OPENAI_API_KEY" in told and "goes on from there" in told
    assert not output.exists()
    asked = len(model.requests)
    model.reply = department
    assert label(model, raw, output) == 0
    assert len(read(output)) == 20 and len(model.requests) == asked + 12


def test_busy_servers_are_asked_again_and_absent_ones_named(
    tmp_path: Path, model: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, output = write(tmp_path / "raw.json", ["问"]), tmp_path / "out.jsonl"
    model.reply = lambda messages, call: (503, "busy") if call == 1 else department(messages, call)
    assert label(model, raw, output) == 0 and len(model.requests) == 2
    monkeypatch.setattr(ask, "SERVER_RETRIES", 1)
    gone = ModelServer()
    gone.close()
    assert label(gone, write(tmp_path / "new.json", ["新"]), output) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_a_question_that_the_server_refuses_costs_one_row(tmp_path: Path, model: ModelServer) -> None:
    model.reply = lambda messages, call: (
        (400, "too long") if "长" in messages[1]["content"] else department(messages, call)
    )
    assert label(model, write(tmp_path / "raw.json", ["短", "长"]), tmp_path / "out.jsonl") == 0
    assert len(read(tmp_path / "out.jsonl")) == 1
    assert "too long" in read(tmp_path / "out.rejects.jsonl")[0]["detail"]


def test_the_key_comes_from_the_environment(
    tmp_path: Path, model: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    model.reply = department
    assert label(model, write(tmp_path / "raw.json", ["问"]), tmp_path / "out.jsonl") == 0
    assert model.keys == ["Bearer sk-secret"]
    told = capsys.readouterr()
    written = "".join(path.read_text("utf-8") for path in tmp_path.iterdir())
    assert "sk-secret" not in told.out + told.err + written


def test_rows_can_be_kept_by_label(tmp_path: Path, model: ModelServer) -> None:
    model.reply = department
    raw = write(tmp_path / "raw.json", ["刀", "药"])
    assert label(model, raw, tmp_path / "out.jsonl", "--keep", "外科", "--field", "科室") == 0
    assert [row["科室"] for row in read(tmp_path / "out.jsonl")] == ["外科"]
    assert [line["code"] for line in read(tmp_path / "out.rejects.jsonl")] == ["label-not-kept"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--labels", "内科"], "at least two"),
        (["--keep", "儿科"], "not among the labels"),
        (["--url", "127.0.0.1:8000"], "http://HOST"),
        (["--labels-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_options_are_named(
    tmp_path: Path, model: ModelServer, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert label(model, write(tmp_path / "raw.json", ["问"]), tmp_path / "out.jsonl", *more) == 2
    assert message in capsys.readouterr().err and model.requests == []


def augment(model: ModelServer, raw: Path, output: Path, *more: str) -> int:
    return main(["data", "augment", str(raw), *more, "--url", model.url, "--model", "m", "--output", str(output)])


def test_questions_are_worded_anew_and_keep_their_answer(tmp_path: Path, model: ModelServer) -> None:
    model.reply = lambda messages, call: (
        200,
        json.dumps({"questions": [messages[1]["content"] + mark for mark in "吗呢"]}),
    )
    raw, output = write(tmp_path / "raw.json", ["一", "二"]), tmp_path / "out.jsonl"
    assert augment(model, raw, output, "--what", "questions", "-n", "2") == 0
    rows = read(output)
    assert [row["messages"][0]["content"] for row in rows] == ["一", "一吗", "一呢", "二", "二吗", "二呢"]
    assert {row["messages"][1]["content"] for row in rows[:3]} == {"答：一"}
    assert [row.get("generated") for row in rows[:3]] == [None, "question", "question"]
    assert rows[1]["generated_by"] == "m"
    assert augment(model, raw, output, "--what", "questions", "-n", "2", "--only-new") == 0
    assert len(read(output)) == 4


def test_too_few_different_questions_leave_the_row_as_it_is(tmp_path: Path, model: ModelServer) -> None:
    model.reply = lambda messages, call: (200, json.dumps({"questions": ["一", "一？", " 一？"]}))
    raw, output = write(tmp_path / "raw.json", ["一"]), tmp_path / "out.jsonl"
    assert augment(model, raw, output, "--what", "questions", "-n", "2") == 0
    assert len(read(output)) == 1
    (line,) = read(tmp_path / "out.rejects.jsonl")
    assert (line["action"], line["code"]) == ("kept", "no-valid-answer") and "1 different new" in line["detail"]


def test_questions_are_answered_with_what_was_said_before(tmp_path: Path, model: ModelServer) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "一"), ("assistant", "二"), ("user", "三"))]
    raw, output = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"
    raw.write_text(json.dumps({"messages": turns, "label": "x"}), encoding="utf-8")
    model.reply = lambda messages, call: (200, json.dumps({"answers": ["四", "五"]}))
    assert augment(model, raw, output, "--what", "answers", "-n", "2") == 0
    assert model.requests[0]["messages"][1:] == turns
    rows = read(output)
    assert [row["messages"][-1] for row in rows] == [{"role": "assistant", "content": text} for text in "四五"]
    assert {(row["generated"], row["label"]) for row in rows} == {("answer", "x")}


@pytest.mark.e2e
def test_our_own_server_understands_what_is_asked(
    tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fake engine answers with nonsense: every row is asked about, none gets a label, each is named."""
    raw = write(tmp_path / "raw.json", ["一", "二"])
    given = ["--labels", "a,b", "--tries", "2", "--max-tokens", "8", "--output", str(tmp_path / "out.jsonl")]
    assert main(["data", "label", str(raw), "--url", f"{service.url}/v1", "--model", MODEL, *given]) == 3
    assert "none of the 2 rows" in capsys.readouterr().err
    details = [line["detail"] for line in read(tmp_path / "out.rejects.jsonl")]
    assert len(details) == 2 and all("2 tries" in detail for detail in details)


def test_the_journal_survives_a_kill_and_any_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    journal = ask.Journal(path)
    journal.add("one", {"text": "a\u2028b\x85c"})
    journal.close(remove=False)
    path.write_bytes(path.read_bytes() + '["two", {"text": "你'.encode()[:-1])  # torn inside of a character
    journal = ask.Journal(path)
    assert (len(journal), journal.get("one")) == (1, {"text": "a\u2028b\x85c"})
    journal.add("three", {})
    journal.close(remove=False)
    journal = ask.Journal(path)
    assert journal.get("three") == {}
    journal.close(remove=True)


def test_a_label_may_not_take_the_place_of_a_row_s_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    words = ["--labels", "x,y", "--url", "http://127.0.0.1:9/v1", "--model", "m", "--output", str(tmp_path / "o.jsonl")]
    assert main(["data", "label", str(tmp_path / "a.jsonl"), *words, "--field", "messages"]) == 2
    assert "--field messages: holds the rows' own text" in capsys.readouterr().err
