"""Chinese words by jieba, for scores that count words. Leaves no file and no line on stderr."""

import functools
import warnings
from typing import Any


def words(text: str) -> list[str]:
    """The words of a text, without white space; each run of Latin letters and digits and each mark is one word.

    Chinese is segmented by jieba 0.42 (accurate mode, its own dictionary, HMM for words that are not in it). Case and
    width of letters stay.
    """
    return [word for word in _tokenizer().lcut(text) if not word.isspace()]


@functools.cache
def _tokenizer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources, where an old setuptools still has it
        import jieba
    jieba.setLogLevel("WARNING")
    tokenizer = jieba.Tokenizer()
    # What its `initialize` does, less the cache: a file of one fixed name in the temporary folder that all users of the
    # machine share, and that whoever comes first may have written.
    with tokenizer.get_dict_file() as dictionary:
        tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(dictionary)
    tokenizer.initialized = True
    return tokenizer
