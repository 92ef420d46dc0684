"""What a query may see of the whole sequence. (What that leaves of one block of it is a `Band`.)"""

from dataclasses import dataclass

from easyctx.documents import Documents


@dataclass(frozen=True)
class Mask:
    """A causal mask, narrowed.

    window: a query sees itself and the `window - 1` positions before it; None for all of them.
    documents: borders that attention does not cross; None for none.
    """

    window: int | None = None
    documents: Documents | None = None

    @property
    def is_causal(self) -> bool:
        """Whether nothing narrows it."""
        return self.window is None and self.documents is None

    def within(self, seq_len: int) -> "Mask":
        """The same mask on `seq_len` tokens, without what has no effect there."""
        window = None if self.window is not None and self.window >= seq_len else self.window
        documents = self.documents
        assert documents is None or documents.length == seq_len
        if documents is not None and documents.is_plain:
            documents = None
        return Mask(window, documents)


CAUSAL_MASK = Mask()
