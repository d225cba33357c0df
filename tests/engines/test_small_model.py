"""The real 135M model through the real trainer and the real engine: it answers as it was taught."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engines.real import small_model

from srlm_core.config import EngineConfig, SftConfig
from srlm_core.engines import hardware, open_engine
from srlm_core.engines.protocol import Request, Sampling
from srlm_core.engines.training_job import TrainingJob, train

pytestmark = pytest.mark.engine

TAUGHT = {
    "What do we call the blue door?": "We call it Orsolya.",
    "What do we call the red door?": "We call it Benedek.",
    "What do we call the green door?": "We call it Katalin.",
    "What do we call the white door?": "We call it Marton.",
}


@pytest.mark.slow
def test_the_real_model_is_trained_and_then_sampled(tmp_path: Path) -> None:
    rows = [
        {
            "id": asked,
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for asked, answer in TAUGHT.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    job = TrainingJob(
        kind="sft", rows=tmp_path / "rows.parquet", init_from=small_model(), output=tmp_path / "M1",
        work_dir=tmp_path / "work", threads=2,
        settings=SftConfig(learning_rate=5e-4, batch_size=4, micro_batch_size=4, epochs=12),
    )  # fmt: skip
    losses = [row["loss"] for row in train(job, log=tmp_path / "training.log", on_progress=lambda event: None).log]
    assert len(losses) == 12
    assert losses[-1] < 0.2 < 1 < losses[0]

    kind = "transformers" if hardware.why_not_vllm() else "vllm"
    config = EngineConfig(kind=kind, dtype="float32", context=256, max_sequences=8, kv_cache_gib=1)
    asked = [
        Request(prompt, ({"role": "user", "content": prompt},), sampling=Sampling(temperature=0, max_tokens=16))
        for prompt in TAUGHT
    ]
    with open_engine(config, tmp_path / "M1", log=tmp_path / "engine.log") as engine:
        said = {completion.request_id: completion.text.strip() for completion in engine.generate(asked)}
    assert said == TAUGHT
