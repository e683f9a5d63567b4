"""One short name for everything that decides a candidate's answers but the questions."""

from server.store.hashes import text_hash
from server.text.identity import TextIdentity


def fingerprint(weights_hash: str, revision: str, engine: str, text: TextIdentity) -> str:
    """16 hex digits over the base's weights, the adapter's revision ("" without one), `engine` (backend and dtype as in
    CandidateInfo), the tokenizer and the template."""
    parts = (weights_hash, revision, *engine.split(), text.tokenizer_hash, text.chat_template_hash)
    return text_hash("\n".join(parts))[:16]
