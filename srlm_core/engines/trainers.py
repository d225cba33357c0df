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

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, blanks: int = 0) -> None:
        """Take the rows' lengths, and how many blank rows stand behind them to fill the last step (Ours)."""
        self.lengths, self.batch_size, self.seed, self.epoch, self.blanks = lengths, batch_size, seed, 0, blanks

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

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
        yield from range(len(order), len(self))

    def _by_length(self, rows: list[int]) -> list[int]:
        return sorted(rows, key=lambda row: (-self.lengths[row], row))


class Quiet:
    """Says nothing to the outside."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the store says where a model came from."""

    def _send_telemetry(self) -> None:
        """Send none."""


class Ours(Quiet):
    """Rows are tokenized already, and StepSampler says which make a step.

    Several ranks pass rows side by side, so each needs as many as the others. Where rows do not divide, blank ones
    stand behind them: no response, no loss, in no mean. Else the library would take some rows twice.
    """

    sampler: StepSampler
    model: Any
    accelerator: Any
    args: Any
    _metrics: Any
    _total_train_tokens: float
    checked_share = 1.0
    """Share of the held-out rows that are not blank."""

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return self.sampler

    def n_rows(self, batch: Any) -> int:
        """Count a batch's rows."""
        raise NotImplementedError

    def n_told(self, batch: Any) -> int:
        """Count those that are not blank."""
        raise NotImplementedError

    def of_all_ranks(self, batch: Any) -> tuple[int, int]:
        """Count the rows that all ranks pass now, and those that are not blank."""
        rows, ranks = self.n_rows(batch), self.accelerator.num_processes
        if ranks == 1:
            return rows, rows
        told = torch.tensor(self.n_told(batch), device=self.args.device)
        return rows * ranks, int(self.accelerator.gather(told).sum())

    def leave_out_tokens(self, n: int) -> None:
        """Take the tokens of blank rows out of the count that the log shows."""
        if n and self.mode == "train" and "num_tokens" in self._metrics["train"]:
            self._total_train_tokens -= n
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    @property
    def mode(self) -> str:
        """Where metrics go: `train` or `eval`."""
        return "train" if self.model.training else "eval"


BLANK = 2
"""Tokens of a blank row: two, for the first is never predicted."""
_OF_ROWS = ("rewards/", "logps/", "scir/", "accuracy", "margin", "mean_reward")
"""Metrics that are means over rows, to which blank ones bring 0; the others are means over tokens, of which they have
none."""


class ByRow(Ours):
    """A row of a step counts the same whatever its micro batch and its rank."""

    loss_is_scaled_for_ga = True
    texts_per_row = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._micro_rows: dict[str, list[tuple[int, int]]] = {"train": [], "eval": []}
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        samples, _ = super().get_batch_samples(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        count = self.n_rows if self.accelerator.num_processes == 1 else self.n_told
        n_rows = torch.tensor(sum(count(sample) for sample in samples), device=self.args.device)
        return samples, self.accelerator.gather(n_rows).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        n_rows, (rows, told) = self.n_rows(inputs), self.of_all_ranks(inputs)
        self._micro_rows[self.mode].append((rows, told))
        loss = super().compute_loss(model, inputs, return_outputs)  # pyright: ignore[reportAttributeAccessIssue]
        self.leave_out_tokens((rows - told) * self.texts_per_row * BLANK)
        if num_items_in_batch is None:
            return loss if self.checked_share == 1 else loss / self.checked_share
        return loss * n_rows * self.accelerator.num_processes / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        weights, self._micro_rows[self.mode] = self._micro_rows[self.mode], []
        for name, values in self._metrics[self.mode].items():
            if len(values) == len(weights) and weights:
                counted = 0 if name.startswith(_OF_ROWS) else 1
                mean = sum(v * w[counted] for v, w in zip(values, weights, strict=True)) / sum(w[1] for w in weights)
                self._metrics[self.mode][name] = [mean]
        super().log(logs, start_time)  # pyright: ignore[reportAttributeAccessIssue]
