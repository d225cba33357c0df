"""Self-rewarding language models as a pipeline: prompts, responses, judgments, pairs, training, evaluation, report."""

__version__ = "0.1.0"
