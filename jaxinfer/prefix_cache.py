"""Which page holds which tokens: a chained digest of a prefix to the page that ends it."""

import hashlib
from array import array
from collections.abc import Sequence


def root_digest(salt: str) -> bytes:
    return hashlib.sha256(salt.encode()).digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class PrefixCache:
    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._contents: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    def find(self, digest: bytes, tokens: tuple[int, ...]) -> int | None:
        page = self._pages.get(digest)
        if page is None or self._contents[page][1] != tokens:
            return None
        return page

    def register(self, digest: bytes, tokens: tuple[int, ...], page: int) -> bool:
        if digest in self._pages:
            return False
        self._pages[digest] = page
        self._contents[page] = digest, tokens
        return True

    def forget(self, page: int) -> None:
        digest, _ = self._contents.pop(page)
        del self._pages[digest]

    def __contains__(self, page: int) -> bool:
        return page in self._contents
