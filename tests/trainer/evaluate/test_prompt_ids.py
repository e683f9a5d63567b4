"""Which tokens are the answer's: also one in which the prompt's end and the answer's beginning are fused."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Stock

from server.text.render import ChatRenderer
from server.text.tokenizer import Tokenizer
from tests.models import make_tokenizer
from trainer.evaluate.candidate import ItemFailed, Prompt
from trainer.evaluate.prompt_ids import PromptIds

QUESTION = Prompt(text="Q: is it so\nA:")
CHAT = Prompt(messages=({"role": "user", "content": "is it so"},))


@pytest.fixture(scope="module")
def stock() -> Stock:
    """It fuses `:no`, as many a tokenizer does."""
    return make_tokenizer([":no :no :no", "Q: is it so\nA: yes\nA:"], 320)


@pytest.fixture(scope="module")
def ids(stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> PromptIds:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    stock.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return PromptIds(ChatRenderer(Tokenizer.load(folder), None))


def expected(stock: Stock, answer: str, prompt: str = QUESTION.text) -> list[str]:
    """The tokens that reach past the prompt's last character."""
    found = stock.encode(prompt + answer)
    return [token for token, (_, end) in zip(found.tokens, found.offsets, strict=True) if end > len(prompt)]


@pytest.mark.parametrize(("answer", "first"), [(" no", "Ġ"), (" yes", "Ġ"), ("no", ":no"), ("noble", ":no")])
def test_a_fused_token_is_the_answers(stock: Stock, ids: PromptIds, answer: str, first: str) -> None:
    own = expected(stock, answer)
    assert own[0].startswith(first)
    for whole, start in (ids.scored(QUESTION, answer)[:2], ids.pair(QUESTION, ids.prompt(QUESTION), answer)):
        assert [stock.id_to_token(token) for token in whole[start:]] == own


def test_the_first_token_has_nothing_before_it(ids: PromptIds) -> None:
    whole, start, end = ids.scored(Prompt(), "yes it is")
    assert (start, end) == (1, len(whole))
    assert ids.scored(Prompt(text=":"), "no")[1:] == (1, 1)


def test_a_continuation_without_ids_is_refused(ids: PromptIds) -> None:
    """A sum over nothing would be 0: no other continuation could be likelier."""
    for prompt, prompt_ids in ((QUESTION, ids.prompt(QUESTION)), (CHAT, [1, 2])):
        with pytest.raises(ItemFailed, match="no-tokens"):
            ids.pair(prompt, prompt_ids, "")
