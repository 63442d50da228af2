"""The pages of the KV cache and who holds them: reference counts and a free list of page ids.

Host only: never imports JAX. It knows no sequence, no token and nothing of what a page stores.
"""

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable


class PagePool:
    """``num_pages`` pages of ``page_size`` tokens, handed out by id in a deterministic order.

    A page is free, or it has as many references as there are holders:

        free --allocate or share--> 1 reference <--share / free--> 2, 3, ... references
          ^----------free---------------'

    A page that was freed may be kept: its content is worth finding again. Kept pages are handed out
    when no other page is free, the one that waited longest first, and can be shared again until
    then. Everything takes constant time a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._num_references = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds, with a content that is worth finding."""
        return len(self._kept)

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold the positions ``0 .. num_tokens - 1``."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> tuple[int, ...] | None:
        """Hands out ``num_pages`` free pages with one reference each.

        All or nothing: with fewer free pages the answer is ``None`` and nothing has changed.
        """
        assert num_pages >= 0, f"asked for {num_pages} pages"
        if num_pages > self.num_free:
            return None
        page_ids = tuple(
            (self._free or self._kept).popitem(last=False)[0] for _ in range(num_pages)
        )
        for page_id in page_ids:
            self._num_references[page_id] = 1
        return page_ids

    def num_kept_among(self, page_ids: Iterable[int]) -> int:
        """Counts those of these pages that are kept, which sharing would take off the free ones."""
        return sum(page_id in self._kept for page_id in page_ids)

    def share(self, page_ids: Iterable[int]) -> None:
        """Adds one reference to each of these pages, which somebody holds or which are kept."""
        for page_id in page_ids:
            if page_id in self._kept:
                del self._kept[page_id]
            else:
                self._check_held(page_id)
            self._num_references[page_id] += 1

    def free(self, page_ids: Iterable[int], keep: Container[int] = ()) -> None:
        """Takes one reference from each page; those without any are free, or kept if in ``keep``.

        ``page_ids`` are in the order of their positions. The last are freed first, hence reused
        first: the front of a sequence is what a later prompt may share.
        """
        for page_id in reversed(tuple(page_ids)):
            self._check_held(page_id)
            self._num_references[page_id] -= 1
            if not self._num_references[page_id]:
                (self._kept if page_id in keep else self._free)[page_id] = None

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Asserts that every page is either free or referenced, and by as many as hold it.

        ``holders`` are the page ids of everyone who holds any; without them only the pool's own
        books are compared. Takes time proportional to ``num_pages``: for tests and idle times.
        """
        assert len(self._num_references) == self.num_pages
        for page_id, count in enumerate(self._num_references):
            assert count >= 0, f"page {page_id} has {count} references"
            lists = (page_id in self._free) + (page_id in self._kept)
            assert lists == (count == 0), f"page {page_id}: {count} references, {lists} lists"
        assert self.num_free == self._num_references.count(0), "unknown pages are free"
        if holders is not None:
            held = Counter(page_id for page_ids in holders for page_id in page_ids)
            counted = {i: count for i, count in enumerate(self._num_references) if count}
            assert held == counted, f"held {dict(held)}, counted {counted}"

    def _check_held(self, page_id: int) -> None:
        assert 0 <= page_id < self.num_pages, f"no page {page_id} among {self.num_pages}"
        assert self._num_references[page_id] > 0, f"page {page_id} is free already"
