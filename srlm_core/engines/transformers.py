"""The transformers engine: plain PyTorch, wherever that runs. Slower than vLLM, and needs nothing else.

Its child decodes one running batch: sequences leave it when they end, others join it, and each draws from a random
stream of its own, so what else is in the batch does not change its draws.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from srlm_core.config import EngineConfig
from srlm_core.engines.local import Answer, Chosen, Completed, LocalEngine, Start, Weighed
from srlm_core.engines.nucleus import nucleus
from srlm_core.engines.protocol import Completion, LogProb, TokenScores
from srlm_core.engines.rendering import Renderer
from srlm_core.engines.serving import Assess, Compare, Continue, Task, serve
