"""The transformers engine: plain PyTorch, wherever that runs. Slower than vLLM, and needs nothing else."""

from collections.abc import Mapping

from srlm_core.engines import hardware
from srlm_core.engines.hardware import Placement
from srlm_core.engines.local import LocalEngine


class TransformersEngine(LocalEngine):
    """The parent's side; engines/decoding.py is the child's."""

    kind = "transformers"
    module = "srlm_core.engines.decoding"

    def environment(self, place: Placement) -> Mapping[str, str]:
        return place.visible() | {
            "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
            "TOKENIZERS_PARALLELISM": "false",
        } | hardware.openmp(place)  # fmt: skip


class RewardEngine(TransformersEngine):
    """The same for a reward model; engines/rewarding.py is the child's."""

    module = "srlm_core.engines.rewarding"
    capabilities = frozenset({"rewards"})
