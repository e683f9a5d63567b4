"""Names of models, adapters and revisions. They become path parts, so they are checked before they touch a path."""

import re
from dataclasses import dataclass

MAX_NAME_LENGTH = 128
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9_-])?")
_REVISION = re.compile(r"[0-9a-f]{12}")


class NameRefused(ValueError):
    """A name that cannot be used; the text says which characters can."""


@dataclass(frozen=True)
class ModelId:
    """An API model id: `name` or `name@revision`."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def check_name(name: str) -> str:
    """Return `name`, or raise NameRefused."""
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name) or ".." in name:
        raise NameRefused(
            f"{name[:MAX_NAME_LENGTH]!r} is not a usable name: take letters, digits, '.', '_', '-' and ':', "
            f"begin with a letter or digit, do not end with '.' or ':', no '..', at most {MAX_NAME_LENGTH} characters"
        )
    return name


def check_revision(revision: str) -> str:
    """Return `revision`, or raise NameRefused."""
    if not _REVISION.fullmatch(revision):
        raise NameRefused(f"{revision[:64]!r} is not a revision: 12 hexadecimal digits are expected")
    return revision


def parse_model_id(text: str) -> ModelId:
    """Split `name` or `name@revision`; raises NameRefused when either part is unusable."""
    name, at, revision = text.partition("@")
    return ModelId(check_name(name), check_revision(revision) if at else None)
