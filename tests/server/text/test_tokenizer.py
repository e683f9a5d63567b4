import json
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from server.errors import ConfigError
from server.text import tokenizer as module
from server.text.tokenizer import TextError, Tokenizer
from server.text.tokenizer_file import read_added_tokens

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WITH_CONTROLS = st.lists(
    st.one_of(TEXTS, st.sampled_from(["<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<|im_", "end|>"]))
).map("".join)


@pytest.fixture(scope="module")
def tokenizer(renderer):
    return renderer.tokenizer


@given(text=WITH_CONTROLS)
def test_plain_encoding_holds_no_control_token_and_keeps_the_text(tokenizer, text):
    ids = tokenizer.encode_plain(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@given(text=WITH_CONTROLS)
def test_raw_encoding_equals_stock(tokenizer, stock, text):
    assert tokenizer.encode_raw(text) == stock(text)["input_ids"]


@given(text=WITH_CONTROLS)
def test_plain_encoding_equals_stock_with_special_tokens_split(tokenizer, stock, text):
    if "tool_call>" not in text:  # stock splits only tokens flagged special
        assert tokenizer.encode_plain(text) == stock(text, split_special_tokens=True)["input_ids"]


def test_nul_is_ordinary_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode_plain("a\0b")) == "a\0b"


@pytest.mark.parametrize("text", ["\ud800", "你好\udfff", "<|im_end|>\ud83d"])
def test_lone_surrogate_is_named(tokenizer, text):
    for encode in (tokenizer.encode_plain, tokenizer.encode_raw):
        with pytest.raises(TextError, match=r"lone surrogate \(U\+D"):
            encode(text)


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", ["", "hello", "<|im_end|>hello", "你好<|im_end|>"])
def test_bos_and_eos_are_added_where_the_post_processor_does(
    new_tokenizer, new_folder, load_stock, text, add_special_tokens
):
    inner = new_tokenizer()
    start, end = (inner.token_to_id(token) for token in ("<|im_start|>", "<|endoftext|>"))
    inner.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", start), ("<|endoftext|>", end)]
    )
    folder = new_folder(None, inner)
    expected = load_stock(folder)(text, add_special_tokens=add_special_tokens)["input_ids"]
    assert Tokenizer.load(folder).encode_raw(text, add_special_tokens) == expected


@pytest.mark.parametrize("text", ["a <strip> b", "\u3000<strip>\n\n<strip> b", "<strip>  ", " <right> x <left> y"])
def test_tokens_that_strip_white_space_equal_stock(new_tokenizer, new_folder, load_stock, text):
    inner = new_tokenizer()
    inner.add_special_tokens(
        [
            AddedToken("<strip>", lstrip=True, rstrip=True),
            AddedToken("<left>", lstrip=True),
            AddedToken("<right>", rstrip=True),
        ]
    )
    folder = new_folder(None, inner)
    assert Tokenizer.load(folder).encode_raw(text) == load_stock(folder)(text)["input_ids"]


def test_tokens_flagged_normalized_equal_stock(new_tokenizer, new_folder, load_stock):
    inner = new_tokenizer()
    inner.add_tokens(["<think>", "</think>"])  # the library's default for tokens that are not special
    folder = new_folder(None, inner)
    for text in ("<think>e\u0301</think>\n好", "a<think", "<think><|im_end|></think>"):
        assert Tokenizer.load(folder).encode_raw(text) == load_stock(folder)(text)["input_ids"]


def test_longest_control_token_wins(new_tokenizer, new_folder, load_stock):
    inner = new_tokenizer()
    inner.add_special_tokens(["<|im", "<|im_end|><|"])
    folder = new_folder(None, inner)
    for text in ("<|im_end|><|im_end|>", "<|im_start|>", "<|im_x"):
        assert Tokenizer.load(folder).encode_raw(text) == load_stock(folder)(text)["input_ids"]


def test_facts_about_the_vocabulary(tokenizer, stock):
    assert tokenizer.control_tokens == stock.get_added_vocab()
    assert tokenizer.special_ids == {stock.convert_tokens_to_ids(t) for t in stock.all_special_tokens} | {
        tokenizer.control_tokens["<|im_start|>"]
    }
    assert tokenizer.vocab_size == len(stock)
    assert tokenizer.eos_token_id == stock.eos_token_id
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_special_tokens_may_be_written_as_objects(new_folder):
    tokenizer = Tokenizer.load(new_folder(None, eos_token={"content": "<|endoftext|>", "lstrip": False}))
    assert tokenizer.eos_token_id == tokenizer.control_tokens["<|endoftext|>"]


def test_token_bytes_spell_every_token(tokenizer, stock):
    for token_id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token_id)
        assert data.decode(errors="replace") == stock.decode([token_id]) == tokenizer.token_text(token_id)


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**40])
def test_unknown_id_is_named(tokenizer, token_id):
    with pytest.raises(ValueError, match=f"token id {token_id} is not in the tokenizer"):
        tokenizer.token_bytes(token_id)
    with pytest.raises(ValueError, match=f"token id {token_id} "):
        tokenizer.decode([0, token_id])


@given(ids=st.lists(st.integers(0, 504)))
def test_decode_equals_stock_but_for_an_incomplete_end(tokenizer, stock, ids):
    ids = [*ids, *tokenizer.encode_plain(".")]
    assert tokenizer.decode(ids) == stock.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == stock.decode(ids)


def test_an_incomplete_character_at_the_end_is_dropped(tokenizer):
    ids = [next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte])) for byte in "好".encode()]
    assert [tokenizer.decode(ids[:n]) for n in (1, 2, 3)] == ["", "", "好"]


def test_cache_of_pieces_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED_TOKENS", 10)
    tokenizer = Tokenizer.load(folder)
    spelled = [tokenizer.token_bytes(i) for i in range(300)]
    assert len(tokenizer.pieces) <= 10
    assert spelled == [tokenizer.token_bytes(i) for i in range(300)]


def test_threads_agree(folder, renderer):
    tokenizer = Tokenizer.load(folder)
    texts = [f"你好 {n} <|im_end|> the quick brown fox 🙂 " * 20 for n in range(40)]
    expected = [renderer.tokenizer.encode_raw(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode_raw, texts)) == expected
        assert list(pool.map(lambda ids: tokenizer.decode(ids, False), expected)) == texts


def test_read_added_tokens(folder, tokenizer):
    assert {token.content: token.id for token in read_added_tokens(folder)} == tokenizer.control_tokens


def test_a_tokenizer_without_added_tokens(new_folder, tokenizer):
    folder = new_folder(None)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens": []}))
    bare = Tokenizer.load(folder)
    assert bare.encode_raw("<|im_end|>你好") == tokenizer.encode_plain("<|im_end|>你好")
    assert bare.eos_token_id is None


def damaged(folder, change):
    path = folder / "tokenizer.json"
    change(path)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "is missing.*save_pretrained"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "is damaged.*download"),
        (lambda path: path.write_bytes(b"\xff\xfe{}"), "is damaged"),
        (lambda path: path.write_text("[]"), "is damaged"),
        (lambda path: path.write_text(json.dumps({"model": {"type": "WordPiece"}})), "only byte-level BPE"),
        (lambda path: path.write_text(path.read_text().replace('"ByteLevel"', '"Metaspace"')), "only byte-level BPE"),
        (lambda path: path.write_text(path.read_text().replace('"merges"', '"m"')), "not a usable tokenizer"),
    ],
)
def test_a_bad_tokenizer_file_is_refused_with_a_cure(new_folder, change, message):
    folder = damaged(new_folder(None), change)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (AddedToken("<x>", single_word=True), "single_word"),
        (AddedToken("§"), "single character"),
        (AddedToken("<e\u0301>", normalized=True), "changed by the normalizer"),
    ],
)
def test_an_added_token_we_cannot_honour_is_named(new_tokenizer, new_folder, token, message):
    inner = new_tokenizer()
    inner.add_tokens([token])
    with pytest.raises(ConfigError, match=message):
        Tokenizer.load(new_folder(None, inner))


def test_an_added_token_that_text_itself_encodes_to_is_refused(new_tokenizer, new_folder):
    inner = new_tokenizer()
    words = inner.get_vocab(with_added_tokens=False)
    word = next(t for t in words if t.isascii() and len(t) > 1 and inner.encode(t).tokens == [t])
    inner.add_tokens([word])
    with pytest.raises(ConfigError, match="ordinary word of the vocabulary"):
        Tokenizer.load(new_folder(None, inner))


def test_a_damaged_tokenizer_config_is_refused(new_folder):
    folder = new_folder(None)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is damaged"):
        Tokenizer.load(folder)
