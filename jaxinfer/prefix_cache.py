"""Finds the pages that hold the beginning of a sequence already. Host only: never imports JAX.

It knows tokens and page ids; who holds a page, and when it is given away, is the page pool's part.
"""

import hashlib
from array import array
from collections.abc import Iterable

from jaxinfer.sequence import Sequence


class PrefixCache:
    """Full pages by what they hold: their own tokens and all tokens before them, within one salt.

        digest 0 = sha256(sha256(salt) + tokens of page 0)
        digest i = sha256(digest i - 1 + tokens of page i)

    A page is found by its digest, and its own tokens are compared as well. At most one page stands
    for a digest: of two that were computed at the same time the first one registered does.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._page_of_digest: dict[bytes, int] = {}
        self._content_of_page: dict[int, tuple[bytes, list[int]]] = {}

    def __contains__(self, page_id: int) -> bool:
        """Whether a page can be found."""
        return page_id in self._content_of_page

    def __len__(self) -> int:
        return len(self._content_of_page)

    def find(self, sequence: Sequence) -> list[int]:
        """The pages that hold the sequence's first tokens, all but its last one at most."""
        page_ids = []
        for number in range((sequence.num_tokens - 1) // self._page_size):
            page_id = self._page_of_digest.get(self._digest(sequence, number))
            if page_id is None:
                break
            if self._content_of_page[page_id][1] != self._tokens(sequence, number):
                break
            page_ids.append(page_id)
        return page_ids

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Makes the sequence's full pages up to ``num_tokens`` findable.

        Their tokens must be known, and calls that compute them scheduled.
        """
        num_pages = num_tokens // self._page_size
        for number in range(sequence.num_registered_pages, num_pages):
            digest = self._digest(sequence, number)
            if digest not in self._page_of_digest:
                page_id = sequence.page_ids[number]
                self._page_of_digest[digest] = page_id
                self._content_of_page[page_id] = digest, self._tokens(sequence, number)
        sequence.num_registered_pages = max(sequence.num_registered_pages, num_pages)

    def forget(self, page_ids: Iterable[int]) -> None:
        """Pages that are about to be overwritten, findable or not."""
        for page_id in page_ids:
            content = self._content_of_page.pop(page_id, None)
            if content is not None:
                del self._page_of_digest[content[0]]

    def check_integrity(self) -> None:
        """Asserts that both directions agree. For tests and idle times."""
        pages = {content[0]: page_id for page_id, content in self._content_of_page.items()}
        assert pages == self._page_of_digest

    def _tokens(self, sequence: Sequence, number: int) -> list[int]:
        return sequence.token_ids[number * self._page_size : (number + 1) * self._page_size]

    def _digest(self, sequence: Sequence, number: int) -> bytes:
        """Computed once for each page of a sequence: tokens never change, they only get more."""
        digests = sequence.digests
        while len(digests) <= number:
            parent = digests[-1] if digests else _sha256(sequence.salt.encode())
            tokens = self._tokens(sequence, len(digests))
            digests.append(_sha256(parent + array("i", tokens).tobytes()))
        return digests[number]


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
