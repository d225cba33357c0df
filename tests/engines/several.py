"""Ranks that train one job after the other: starting them costs more than a job of a tiny model does."""

import sys
from pathlib import Path

from srlm_core.engines import trl
from srlm_core.engines.training_job import TrainingJob

if __name__ == "__main__":
    for described in sys.argv[1:]:
        trl.work(TrainingJob.model_validate_json(Path(described).read_text()))
