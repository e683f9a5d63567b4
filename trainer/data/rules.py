"""Rules for rows that teach nothing good, each with a name and, where it has one, a limit. Knows one row at a time.

A rule looks at the turns that are learnt: (question, answer) pairs, or the whole text of a pt row.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainer.data.rows import Row
from trainer.data.texts import answer_of, normalised, question_of

CJK = re.compile(r"[\u2e80-\ud7ff\uf900-\ufaff]")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"\w")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_URL = re.compile(r"(?:https?://|www\.)[^\s，。；、）)》\u4e00-\u9fff]+", re.IGNORECASE)
_TAG = re.compile(r"</?(?:a|b|br|center|div|font|h[1-6]|i|img|li|ol|p|span|strong|table|tbody|td|tr|ul)\b[^<>]*>", re.I)
_ADVERT = re.compile(
    r"[加添]\s*(?:我|下|一下)?\s*(?:微信|薇信|威信|vx|qq|扣扣)|(?:微信|公众|qq)号?\s*[:：]\s*[\w-]{5,}|qq群\s*[:：]?\s*\d{5,}"
    r"|扫[一描]?[扫码描]?.{0,8}二维码|点击.{0,8}(?:链接|咨询|查看更多|购买|下载)|(?:咨询|免费|服务|统一)(?:热线|电话)\s*[:：]?\s*\d[\d-]{6,}"
    r"|click (?:here|the link) (?:to|for|and)|subscribe to our|limited[- ]time offer",
    re.IGNORECASE,
)
_NOTHING = re.compile(
    r"(?:无|没有|暂无|空|略|同上|同楼上|如上|如题|见图|见附件|不知道|不详|未知|待补充"
    r"|n\s*/?\s*a|nil|null|none|nan|unknown|tbd|todo|same as above)+",
    re.IGNORECASE,
)
_EDGE = re.compile(r"^[\W_]+|[\W_]+$")
_REFUSAL = re.compile(
    r"作为(?:一个|一名)?\s*(?:AI|人工智能|大?语言模型)|(?:抱歉|对不起)[，,]?\s*我(?:无法|不能)(?:回答|提供|协助)"
    r"|as an ai(?: language)? model|i(?:'m| am) sorry,? but i can(?:no|')t",
    re.IGNORECASE,
)
# The replacement character; GBK readings of it; UTF-8 read as Latin-1 or Windows-1252: two characters in a row, or a
# quotation mark, a dash or an ellipsis.
_WINDOWS = bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")
_MOJIBAKE = re.compile(
    rf"\ufffd|锟斤拷|烫{{3,}}|屯{{3,}}|(?:[\u00c2-\u00f4][\u0080-\u00bf{_WINDOWS}]{{1,3}}){{2,}}"
    "|\u00e2\u20ac[\u2122\u0153\u02dc\u201c\u201d\u00a6]"
)
_DRAWING = set(" \t\n-=_*.#~·…—─━│|+/\\0")


@dataclass(frozen=True)
class Rule:
    """`check(row, limit)` says why the row goes, never quoting it, or None."""

    name: str
    text: str
    check: Callable[[Row, float], str | None]
    limit: float = 0.0  # 0: the rule has none
    is_on: bool = True


def _pairs(row: Row) -> Iterator[tuple[str, str]]:
    """Each answer that is learnt as text, with the question before it. A turn that only calls tools is not one."""
    if not row.messages:
        yield "", row.text
    question = ""
    for message in row.messages:
        if message["role"] == "user":
            question = str(message["content"])
        elif message["role"] == "assistant" and not message.get("tool_calls"):
            yield question, str(message["content"])
    if row.chosen:
        yield question, row.chosen


def _each(find: Callable[[str, str, float], str | None]) -> Callable[[Row, float], str | None]:
    def check(row: Row, limit: float) -> str | None:
        for position, (question, answer) in enumerate(_pairs(row), start=1):
            reason = find(question, answer, limit)
            if reason:
                return reason if position == 1 and not row.messages[2:] else f"answer {position}: {reason}"
        return None

    return check


def _too_long(row: Row, limit: float) -> str | None:
    length = sum(len(str(message["content"])) for message in row.messages) + len(row.text + row.chosen)
    return f"{length} characters, at most {limit:g}" if length > limit else None


def _too_short(question: str, answer: str, limit: float) -> str | None:
    length = len(answer.strip())
    return f"{length} characters, at least {limit:g}" if length < limit else None


def _url(question: str, answer: str, limit: float) -> str | None:
    share = sum(map(len, _URL.findall(answer))) / max(1, len(answer))
    return f"{share:.0%} of the answer is addresses, at most {limit:.0%}" if share > limit else None


def _html(question: str, answer: str, limit: float) -> str | None:
    count = len(_TAG.findall(_CODE.sub("", answer))) if "<" in answer else 0
    asked = count > limit and ("html" in question.lower() or _TAG.search(question))
    return f"{count} tags outside of code, at most {limit:g}" if count > limit and not asked else None


def _advert(question: str, answer: str, limit: float) -> str | None:
    count = len(_ADVERT.findall(answer))
    return f"{count} invitations to a contact, a link or a hot line" if count else None


def _repeated(question: str, answer: str, limit: float) -> str | None:
    runs = int(limit)
    for found in re.finditer(rf"(.{{1,12}}?)\1{{{runs - 1},}}", answer, re.DOTALL):
        if set(found[1]) - _DRAWING:
            return f"{len(found[0]) // len(found[1])} times the same {len(found[1])} characters in a row"
    return None


def _echo(question: str, answer: str, limit: float) -> str | None:
    return "the answer is the question" if question and normalised(question) == normalised(answer) else None


def _says_nothing(question: str, answer: str, limit: float) -> str | None:
    return "says that there is none" if _NOTHING.fullmatch(_EDGE.sub("", answer)) else None


def _asks_nothing(row: Row, limit: float) -> str | None:
    if row.text or not _NOTHING.fullmatch(_EDGE.sub("", question_of(row))):
        return None
    return "says that there is none"


def _no_words(question: str, answer: str, limit: float) -> str | None:
    return None if _WORD.search(answer) else "neither a letter nor a digit"


def _refusal(question: str, answer: str, limit: float) -> str | None:
    found = _REFUSAL.search(answer)
    return "refuses to answer" if found and found.start() < limit else None


def _mojibake(row: Row, limit: float) -> str | None:
    text = "\n".join((question_of(row), answer_of(row)))
    count = len(_MOJIBAKE.findall(text))
    return f"{count} places that were decoded with the wrong encoding" if count else None


def _language(is_wanted: re.Pattern[str], name: str) -> Callable[[Row, float], str | None]:
    def check(row: Row, limit: float) -> str | None:
        letters = _LETTER.findall(_CODE.sub("", answer_of(row)))
        share = sum(1 for letter in letters if is_wanted.match(letter)) / max(1, len(letters))
        return f"{share:.0%} of the letters are {name}, at least {limit:.0%}" if letters and share < limit else None

    return check


RULES: tuple[Rule, ...] = (
    Rule("too-long", "more characters in all turns together than the limit", _too_long, 32_000),
    Rule("too-short", "an answer has fewer characters than the limit", _each(_too_short), 2, is_on=False),
    Rule("says-nothing", "an answer is nothing but 无, 同上, n/a and the like", _each(_says_nothing)),
    Rule("asks-nothing", "the question is nothing but 无, 如题, n/a and the like", _asks_nothing),
    Rule("no-words", "an answer has neither a letter nor a digit", _each(_no_words)),
    Rule("echo", "an answer repeats its question", _each(_echo)),
    Rule("url", "a larger share of an answer than the limit is web addresses", _each(_url), 0.7),
    Rule("html", "more HTML tags outside of code than the limit, and nobody asked for HTML", _each(_html), 2),
    Rule("advert", "an answer invites to a contact, a link or a hot line", _each(_advert)),
    Rule("repeated", "the same 1 to 12 characters as often in a row as the limit", _each(_repeated), 12),
    Rule("mojibake", "text that was decoded with the wrong encoding", _mojibake),
    Rule("refusal", "an answer refuses within its first characters", _each(_refusal), 40, is_on=False),
    Rule(
        "not-chinese",
        "a smaller share of letters outside of code than the limit is Chinese",
        _language(CJK, "Chinese"),
        0.3,
        False,
    ),
    Rule(
        "not-english",
        "a smaller share of letters outside of code than the limit is Latin",
        _language(re.compile(r"[a-z]", re.I), "Latin"),
        0.7,
        False,
    ),
)
