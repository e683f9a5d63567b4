"""Copying what describes a model's text side, byte for byte, so that training and merging cannot make it drift."""

import shutil
from pathlib import Path

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
# Vocabularies of other kinds, and the code of remote-code models.
TEXT_PATTERNS = ("*.model", "*.tiktoken", "*.py")


def copy_text_files(base: Path, target: Path) -> None:
    """Everything in `base` that is neither weights nor the architecture's config.json."""
    found = [base / name for name in TEXT_FILES]
    found += [file for pattern in TEXT_PATTERNS for file in sorted(base.glob(pattern))]
    for file in found:
        if file.is_file():
            shutil.copyfile(file, target / file.name)
