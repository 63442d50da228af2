import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxinfer.page_pool import PagePool

NUM_PAGES = 8


def test_allocates_all_or_nothing() -> None:
    pool = PagePool(3, page_size=4)
    assert pool.allocate(2) == (0, 1)
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.allocate(0) == ()
    assert pool.allocate(1) == (2,)
    assert pool.num_free == 0


def test_page_is_free_when_its_last_holder_frees_it() -> None:
    pool = PagePool(2, page_size=4)
    page_ids = pool.allocate(2)
    assert page_ids is not None
    pool.share(page_ids[:1])
    pool.free(page_ids)
    assert pool.num_free == 1
    pool.check_integrity([page_ids[:1]])
    pool.free(page_ids[:1])
    assert pool.num_free == 2


def test_longest_free_page_is_reused_first_and_fronts_of_sequences_last() -> None:
    pool = PagePool(6, page_size=4)
    first, second = pool.allocate(2), pool.allocate(2)
    assert first == (0, 1)
    assert second == (2, 3)
    pool.free((2, 3))
    pool.free((0, 1))
    assert pool.allocate(6) == (4, 5, 3, 2, 1, 0)


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_num_pages_for(num_tokens: int, num_pages: int) -> None:
    assert PagePool(1, page_size=4).num_pages_for(num_tokens) == num_pages


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0), (-1, 4)])
def test_refuses_sizes_below_one(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got"):
        PagePool(num_pages, page_size)


@pytest.mark.parametrize("page_id", [-1, 2, 0])
def test_free_and_share_of_unknown_or_free_pages_are_caught(page_id: int) -> None:
    pool = PagePool(2, page_size=4)
    with pytest.raises(AssertionError):
        pool.free([page_id])
    with pytest.raises(AssertionError):
        pool.share([page_id])


def test_double_free_is_caught() -> None:
    pool = PagePool(2, page_size=4)
    page_ids = pool.allocate(1)
    assert page_ids is not None
    pool.free(page_ids)
    with pytest.raises(AssertionError, match="page 0 is free already"):
        pool.free(page_ids)


def test_check_integrity_sees_a_leak_and_a_stranger() -> None:
    pool = PagePool(2, page_size=4)
    page_ids = pool.allocate(1)
    assert page_ids is not None
    pool.check_integrity()
    pool.check_integrity([page_ids])
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    with pytest.raises(AssertionError):
        pool.check_integrity([page_ids, page_ids])
    with pytest.raises(AssertionError):
        pool.check_integrity([(1,)])


class PagePoolMachine(RuleBasedStateMachine):
    """Holders allocate, share and free in any order; a plain dict of holders is the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, page_size=4)
        self.holders: list[tuple[int, ...]] = []
        self.kept: list[int] = []

    @rule(num_pages=st.integers(0, NUM_PAGES + 1))
    def allocate(self, num_pages: int) -> None:
        num_free = self.pool.num_free
        page_ids = self.pool.allocate(num_pages)
        assert (page_ids is None) == (num_pages > num_free)
        if page_ids is not None:
            assert len(set(page_ids)) == num_pages
            assert not {i for held in self.holders for i in held} & set(page_ids)
            # Kept pages go last, in the order in which they were freed.
            num_kept_taken = max(0, num_pages - (num_free - len(self.kept)))
            assert set(self.kept) & set(page_ids) == set(self.kept[:num_kept_taken])
            del self.kept[:num_kept_taken]
            self.holders.append(page_ids)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share_prefix(self, data: st.DataObject) -> None:
        page_ids = data.draw(st.sampled_from(self.holders))
        page_ids = page_ids[: data.draw(st.integers(0, len(page_ids)))]
        self.pool.share(page_ids)
        self.holders.append(page_ids)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def share_kept(self, data: st.DataObject) -> None:
        page_ids = data.draw(st.lists(st.sampled_from(self.kept), unique=True))
        num_free = self.pool.num_free
        assert self.pool.num_kept_among(page_ids) == len(page_ids)
        self.pool.share(page_ids)
        assert self.pool.num_free == num_free - len(page_ids)
        self.kept = [page_id for page_id in self.kept if page_id not in page_ids]
        self.holders.append(tuple(page_ids))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), keeps=st.booleans())
    def free(self, data: st.DataObject, keeps: bool) -> None:
        page_ids = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.free(page_ids, keep=page_ids if keeps else ())
        held = {i for held in self.holders for i in held}
        if keeps:
            self.kept += [page_id for page_id in reversed(page_ids) if page_id not in held]

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity(self.holders)
        held = {i for page_ids in self.holders for i in page_ids}
        assert self.pool.num_free == NUM_PAGES - len(held)
        assert self.pool.num_kept == len(self.kept)


TestPagePoolMachine = PagePoolMachine.TestCase
