"""Calls of a stock model that go through it side by side, so that keys of one layer at a time are all that is kept.

One call, the leader, has the tokens that the others attend to. As its attention of a layer is done, each follower in
turn runs on to its own attention of the next layer, where it waits for the leader's keys. Followers are threads, of
which one at a time runs: every rank runs them in the same order, so messages between ranks match.
"""

import threading
from collections.abc import Callable, Sequence

import torch

from easyctx.generation.prefix import Keys, count_before
from easyctx.generation.store import KeyStore
from easyctx.layout import Run, within


class LayerKeys(KeyStore):
    """The leader's keys, as long as its layer lasts.

    Args:
        runs: positions of this rank's share of the leader's tokens.
    """

    def __init__(self, runs: tuple[Run, ...]) -> None:
        super().__init__(capacity=0)
        self.runs = runs
        self._followers: list[_Follower] = []
        self._now: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def put(self, layer: int, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor) -> None:
        """In the leader: have all followers run as far as these keys take them."""
        self._now = layer, k_BSKD, v_BSKD
        for follower in self._followers:
            follower.run_on()
        self._now = None

    def extend(self, runs: tuple[Run, ...]) -> None:
        assert runs == self.runs

    def keys(self, layer: int, start: int, stop: int, device: torch.device) -> list[Keys]:
        """In a follower: the leader's keys of the layer, once they are there."""
        first, last = count_before(self.runs, start), count_before(self.runs, stop)
        if stop == 0:  # the leader itself, or a follower that needs nothing of it
            return []
        while self._now is None or self._now[0] != layer:
            follower = threading.current_thread()
            assert isinstance(follower, _Follower), "the leader attends to its own keys only"
            follower.pause()
        if first == last:
            return []
        _, k, v = self._now
        return [Keys(k[:, first:last], v[:, first:last], tuple(run for _, run in within(self.runs, start, stop)))]

    def run(self, leader: Callable[[], object], followers: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """Run the leader's call and, beside it, the followers'; the followers' results."""
        self._followers = [_Follower(follower) for follower in followers]
        try:
            for follower in self._followers:
                follower.start()
            leader()
            assert all(follower.is_over for follower in self._followers)
            return [follower.result for follower in self._followers]
        finally:
            for follower in self._followers:
                follower.give_up()
            self._followers = []


class _Follower(threading.Thread):
    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.result = torch.empty(0)
        self.is_over = self.is_given_up = False
        self._error: BaseException | None = None
        self._turn, self._leaders_turn = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        try:
            self._wait_for_turn()
            # Both are settings of each thread.
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            with torch.inference_mode():
                self.result = self.work()
        except BaseException as error:
            self._error = error
        self.is_over = True
        self._leaders_turn.release()

    def pause(self) -> None:
        """In the follower: let the leader go on."""
        self._leaders_turn.release()
        self._wait_for_turn()

    def run_on(self) -> None:
        """In the leader: until the follower pauses or is over. Raises what the follower raised."""
        if not self.is_over:
            self._turn.release()
            self._leaders_turn.acquire()
        if self._error is not None:
            raise self._error

    def give_up(self) -> None:
        """In the leader: end a follower that waits."""
        if not self.is_over:
            self.is_given_up = True
            self._turn.release()
            self._leaders_turn.acquire()

    def _wait_for_turn(self) -> None:
        self._turn.acquire()
        if self.is_given_up:
            raise RuntimeError("the call that this one follows failed")
