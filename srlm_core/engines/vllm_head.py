"""vLLM's head in float32 (exact_head.py) on a processor: in the steps in which a row's probabilities are asked for.

vLLM has the setting (`head_dtype`). On a GPU it is one product with another output type, without a copy; we have not
measured it. On a processor the whole head is converted at each step, which halves the speed of sampling; and a drawn
token needs no more digits than it is drawn by.

Only an engine's child imports the module.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers import logits_processor
from vllm.v1.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate


@logits_processor.LogitsProcessor.register_oot
class ExactWhenAsked(logits_processor.LogitsProcessor):
    """Takes the place of vLLM's layer; `head_dtype` holds while `asked` does."""

    asked = True

    def _apply_head(self, lm_head: Any, hidden_states: torch.Tensor, embedding_bias: torch.Tensor | None) -> Any:
        if not ExactWhenAsked.asked:
            return lm_head.quant_method.apply(lm_head, hidden_states, bias=embedding_bias)
        return super()._apply_head(lm_head, hidden_states, embedding_bias)


class Asked(LogitsProcessor):
    """Changes no logits: follows which rows of the batch are asked for probabilities, before the batch is computed."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, bool] = {}

    def is_argmax_invariant(self) -> bool:
        """Say yes: nothing is changed."""
        return True

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        """Follow requests through the rows of the batch."""
        from vllm.v1.sample.logits_processor.builtin import process_dict_updates

        process_dict_updates(self._rows, batch_update, lambda params, prompt, said: _is_question(params))
        ExactWhenAsked.asked = bool(self._rows)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as they are."""
        return logits


def _is_question(params: "SamplingParams") -> bool | None:
    return (params.prompt_logprobs is not None or params.logprob_token_ids is not None) or None
