"""Finds the pages that hold the beginning of a sequence already. Host only: never imports JAX.

It knows tokens and page ids; who holds a page, and when it is given away, is the page pool's part.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import takewhile

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
        # Of those, which have keys and values of the drafter too.
        self._with_drafter: set[int] = set()
        # Digest and tokens as bytes, which the garbage collector need not walk through.
        self._content_of_page: dict[int, tuple[bytes, bytes]] = {}

    def __contains__(self, page_id: int) -> bool:
        """Tells whether a page can be found."""
        return page_id in self._content_of_page

    def __len__(self) -> int:
        return len(self._content_of_page)

    def find(self, sequence: Sequence) -> list[int]:
        """The pages that hold the sequence's first tokens, all but its last one at most."""
        page_ids: list[int] = []
        for digest, tokens in self._contents(sequence, 0, sequence.num_tokens - 1):
            page_id = self._page_of_digest.get(digest)
            if page_id is None or self._content_of_page[page_id][1] != tokens:
                break
            page_ids.append(page_id)
        return page_ids

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Makes the sequence's full pages up to ``num_tokens`` findable.

        Their tokens must be known, and calls that compute them scheduled.
        """
        first, num_pages = sequence.num_registered_pages, num_tokens // self._page_size
        if num_pages <= first:
            return
        contents = self._contents(sequence, first, num_tokens)
        for page_id, content in zip(sequence.page_ids[first:num_pages], contents, strict=True):
            if content[0] not in self._page_of_digest:
                self._page_of_digest[content[0]] = page_id
                self._content_of_page[page_id] = content
        sequence.num_registered_pages = num_pages

    def note_drafter_kv_pages(self, sequence: Sequence) -> None:
        """Marks pages for which the drafter's keys and values are known to be there."""
        num_pages = min(
            sequence.num_drafter_kv_tokens // self._page_size, sequence.num_registered_pages
        )
        new = sequence.page_ids[sequence.num_drafter_kv_pages : num_pages]
        self._with_drafter.update(page_id for page_id in new if page_id in self._content_of_page)
        sequence.num_drafter_kv_pages = max(sequence.num_drafter_kv_pages, num_pages)

    def num_drafter_kv_pages(self, page_ids: Iterable[int]) -> int:
        """Counts the pages, from the first on, that have the drafter's keys and values."""
        return sum(1 for _ in takewhile(self._with_drafter.__contains__, page_ids))

    def forget(self, page_ids: Iterable[int]) -> None:
        """Pages that are about to be overwritten, findable or not."""
        for page_id in page_ids:
            content = self._content_of_page.pop(page_id, None)
            if content is not None:
                del self._page_of_digest[content[0]]
                self._with_drafter.discard(page_id)

    def check_integrity(self) -> None:
        """Asserts that both directions agree. For tests and idle times."""
        pages = {content[0]: page_id for page_id, content in self._content_of_page.items()}
        assert pages == self._page_of_digest
        assert self._with_drafter <= self._content_of_page.keys()

    def _contents(
        self, sequence: Sequence, first: int, num_tokens: int
    ) -> Iterator[tuple[bytes, bytes]]:
        """(digest, tokens as bytes) of each full page from page ``first`` up to ``num_tokens``.

        Digests are kept on the sequence: its tokens never change, there are only more of them.
        """
        digests, page_size = sequence.digests, self._page_size
        tokens = array("i", sequence.token_ids[first * page_size : num_tokens]).tobytes()
        size = page_size * array("i").itemsize
        for number in range(num_tokens // page_size - first):
            page_tokens = tokens[number * size : (number + 1) * size]
            if first + number == len(digests):
                parent = digests[-1] if digests else _sha256(sequence.salt.encode())
                digests.append(_sha256(parent + page_tokens))
            yield digests[first + number], page_tokens


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
