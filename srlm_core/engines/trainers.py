"""What our subclasses of TRL's trainers share: which rows make a step, means over rows, and no words to the outside."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch


class StepSampler(torch.utils.data.Sampler[int]):
    """Random steps of `batch_size` rows of like length: out of each pool of random rows, sorted.

    Like rows pad little and share long beginnings, and a judgment's few tokens do not drown among an answer's hundreds.
    Which rows make a step depends on seed, epoch and lengths alone: neither micro batch nor resumption changes it.
    """

    POOL = 16
    """Most steps' worth of rows in a pool; half the steps where there are fewer, or every seed would make the same."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        rest = len(order) % self.batch_size
        whole = order[: len(order) - rest]
        pool = min(self.POOL, max(1, len(whole) // self.batch_size // 2)) * self.batch_size
        pooled = [row for start in range(0, len(whole), pool) for row in self._by_length(whole[start : start + pool])]
        steps = [pooled[start : start + self.batch_size] for start in range(0, len(pooled), self.batch_size)]
        for step in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[step]
        yield from self._by_length(order[len(whole) :])  # a step that is not full comes last, as the trainer counts

    def _by_length(self, rows: list[int]) -> list[int]:
        return sorted(rows, key=lambda row: (-self.lengths[row], row))


class Quiet:
    """Says nothing to the outside."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the store says where a model came from."""

    def _send_telemetry(self) -> None:
        """Send none."""


class Ours(Quiet):
    """Rows are tokenized already, and StepSampler says which make a step."""

    sampler: StepSampler
    model: Any
    accelerator: Any
    args: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return self.sampler


class ByRow(Ours):
    """A row of a step counts the same whatever its micro batch."""

    loss_is_scaled_for_ga = True
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._micro_rows: dict[str, list[int]] = {"train": [], "eval": []}
        super().__init__(*args, **kwargs)

    def n_rows(self, batch: Any) -> int:
        """Count a batch's rows."""
        raise NotImplementedError

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        samples, _ = super().get_batch_samples(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        n_rows = torch.tensor(sum(self.n_rows(sample) for sample in samples), device=self.args.device)
        return samples, self.accelerator.gather(n_rows).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        n_rows = self.n_rows(inputs)
        self._micro_rows[self.mode].append(n_rows)
        loss = super().compute_loss(model, inputs, return_outputs)  # pyright: ignore[reportAttributeAccessIssue]
        if num_items_in_batch is None:
            return loss
        return loss * n_rows * self.accelerator.num_processes / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        weights, self._micro_rows[self.mode] = self._micro_rows[self.mode], []
        for name, values in self._metrics[self.mode].items():
            if len(values) == len(weights) and weights:
                mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
                self._metrics[self.mode][name] = [mean]
        super().log(logs, start_time)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def mode(self) -> str:
        """Where metrics go: `train` or `eval`."""
        return "train" if self.model.training else "eval"
