"""Token ids of one sequence to text, as they come. Knows nothing about stop strings or requests."""

import codecs

from server.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence. All `add` results joined with `finish()` equal `Tokenizer.decode` of all its ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._tail = b""  # the begun, incomplete character: at most 3 bytes

    def add(self, token_id: int) -> str:
        """Text that became complete with this token, often all of it, sometimes none.

        An id the tokenizer does not have adds nothing: embeddings have padding rows, and a model may pick one.
        """
        if token_id in self._skipped:
            return ""
        try:
            piece = self._pieces[token_id]
        except ValueError:
            return ""
        if not self._tail and isinstance(piece, str):
            return piece
        return self._join(piece.encode() if isinstance(piece, str) else piece)

    def finish(self) -> str:
        """Close the text. A character whose last bytes never came is dropped: it was cut by a limit, it is no error
        of the text, and U+FFFD would differ from what a longer answer shows at that place."""
        self._tail = b""
        return ""

    def _join(self, data: bytes) -> str:
        data = self._tail + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._tail = data[used:]
        return text
