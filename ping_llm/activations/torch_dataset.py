"""Shuffled batches of a store as a dataset of torch."""

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info


class ActivationDataset(IterableDataset[Tensor]):
    """Batches [batch_size, D] of activations, each worker of a `DataLoader` its part of them."""

    def __init__(self, batches: Callable[..., Iterator[Tensor]], part: tuple[int, int]):
        self._batches, self._part = batches, part

    def __iter__(self) -> Iterator[Tensor]:
        """Returns the batches of this worker; of all where it is in none."""
        number, parts = self._part
        if (worker := get_worker_info()) is not None:
            number, parts = number * worker.num_workers + worker.id, parts * worker.num_workers
        return self._batches(part=(number, parts))
