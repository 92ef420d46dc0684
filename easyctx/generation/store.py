"""Keys and values that outlive a call of the model: a rank's share of a prompt's."""

import torch

from easyctx.generation.prefix import Keys, count_before
from easyctx.layout import Run, within


class KeyStore:
    """This rank's keys and values of the sharded tokens so far, for every layer, on its device or on the host.

    Args:
        capacity: tokens that the rank will hold at most.
        offload: keep them in host memory, and bring a layer's to the device when it is called.
    """

    def __init__(self, capacity: int, *, offload: bool = False) -> None:
        self.capacity, self.offload = capacity, offload
        self.runs: tuple[Run, ...] = ()
        self._layers: dict[int, torch.Tensor] = {}

    @property
    def filled(self) -> int:
        """Tokens held, the same for all layers between calls of the model."""
        return sum(run.count for run in self.runs)

    def put(self, layer: int, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor) -> None:
        """Keep a layer's keys and values `[1, n, K, D]` of the tokens that `extend` will then name."""
        first = self.filled
        last = first + k_BSKD.shape[1]
        assert last <= self.capacity
        if layer not in self._layers:
            shape = (2, 1, self.capacity, *k_BSKD.shape[2:])
            device = "cpu" if self.offload else k_BSKD.device
            pin = self.offload and k_BSKD.device.type == "cuda"
            self._layers[layer] = torch.empty(shape, dtype=k_BSKD.dtype, device=device, pin_memory=pin)
        buffer = self._layers[layer]
        buffer[0, :, first:last].copy_(k_BSKD, non_blocking=True)
        buffer[1, :, first:last].copy_(v_BSKD, non_blocking=True)

    def extend(self, runs: tuple[Run, ...]) -> None:
        """The positions of what was `put` in all layers; they follow all that is held."""
        self.runs += runs

    def keys(self, layer: int, start: int, stop: int, device: torch.device) -> list[Keys]:
        """The layer's keys at positions `start` to `stop`, on the device; none where there are none."""
        first, last = count_before(self.runs, start), count_before(self.runs, stop)
        if first == last:
            return []
        # One by one, so that each copy from the host is of one stretch; ordered on the stream behind what filled it.
        k, v = (part[:, first:last].to(device, non_blocking=True) for part in self._layers[layer])
        return [Keys(k, v, tuple(run for _, run in within(self.runs, start, stop)))]
