"""One frozen tree of settings; the defaults are the paper's (arXiv:2401.10020), each with its unit and section."""

import functools
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

DEMO_MODEL = "smollm2-135m-instruct"
"""Name of the small model that comes from a Python package; see engines/models.py."""


PASSWORD = r"://[^/@\s]*:[^/@\s]+@"
"""Of whoever is named in an address."""


class Settings(BaseModel):
    """Base of every node: frozen, unknown keys refused, attribute docstrings are the field descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _no_secret_is_in_an_address(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if any(re.search(PASSWORD, text) for text in (value if isinstance(value, list | tuple) else [value])
                   if isinstance(text, str)):  # fmt: skip
                raise PydanticCustomError(
                    "password_in_address",
                    "{name}: expected an address without a password: settings are written down and shown. Put it into "
                    "the environment: engine.api_key_env for an endpoint, MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD for MLflow, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3.",
                    {"name": name},
                )
        return given


class ModelConfig(Settings):
    """The base model M0."""

    path: str = DEMO_MODEL
    """A checkpoint folder, a hub id, or `smollm2-135m-instruct` (from its Python package)."""
    revision: str | None = None
    """Hub revision; null = the hub's default branch."""
    trust_remote_code: bool = False
    """Run code that the checkpoint ships. Off unless asked: it is somebody else's program."""


class EngineConfig(Settings):
    """How models are run for sampling and scoring."""

    kind: Literal["auto", "vllm", "transformers", "openai", "scripted"] = "auto"
    """`auto`: vllm where it can run, else transformers (and the log says so)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    context: int = Field(default=4096, ge=64)
    """Longest prompt plus response, tokens. Longer ones are dropped with a reason, never cut."""
    max_sequences: int | None = Field(default=None, ge=1)
    """Sequences decoded at once; null = 64 on a processor, 256 on a GPU (`srlm doctor` says why)."""
    placement: Literal["local", "ray"] = "local"
    """Where replicas run: `local` = on this machine; `ray` = on the nodes of a Ray cluster, which share its folders."""
    ray_address: str | None = None
    """Ray cluster, HOST:PORT of its head, or `auto` for the one that this machine belongs to; null = RAY_ADDRESS in the
    environment, else a Ray of our own on this machine, which ends with us."""
    replicas: int = Field(default=1, ge=1)
    """Engines of one model side by side, one per GPU (or tensor-parallel group)."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that hold one replica."""
    gpu_memory: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that an engine may take."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """KV cache on CPU, GiB; null = a quarter of the free memory, at most 8, over the replicas."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one replica; null = all cores divided by the replicas."""
    compiled: bool | None = None
    """Compile the model at start (vllm): slower to start, faster to run; null = where the job is long enough."""
    base_url: str | None = None
    """OpenAI-compatible endpoint (kind `openai`), such as http://127.0.0.1:8000/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; the key itself is never a setting."""
    max_in_flight: int = Field(default=64, ge=1)
    """Requests to an endpoint at once."""
    shard_rows: int = Field(default=64, ge=1)
    """Prompts of one shard: the unit of resume. What a crash costs at most, times the shards in flight."""
    shards_in_flight: int = Field(default=8, ge=1)
    """Shards worked on at once; enough of them keep the batch full."""


class SamplingConfig(Settings):
    """How text is drawn."""

    temperature: float = Field(default=0.7, ge=0)
    """0 = greedy. Paper: 0.7 for responses and judgments (section 3.1.3)."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Nucleus: smallest set of tokens whose probability reaches this (section 3.1.3)."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest completion, tokens."""


class SeedDataConfig(Settings):
    """What M1 is trained from (section 2.1, 'Seed instruction following data' and 'Seed LLM-as-a-Judge data')."""

    ift: str = "seed"
    """File or dataset of instructions with responses (`srlm data` shows what is taken), or `seed` = what ships."""
    eft: str = "seed"
    """File or dataset of ranked groups, or `seed`."""
    eft_targets: Literal["written", "self", "endpoint", "ranked", "self_taught"] = "written"
    """What the judge learns to say. `written` = the score and the judgment that stand beside each response, as in the
    seed corpus. `self` = what sft_baseline says of it, where its scores agree with people's ranking (section 3.1.1).
    `endpoint` = the same by the model that `eft_endpoint` names: a weak model's own judgments rarely agree.
    `ranked` = the score that the ranking gives; where the form is `justified`, below sft_baseline's justification.
    `self_taught` = which of two responses is better, for methods that compare them: people's to an instruction of IFT,
    or sft_baseline's to another request that it makes of it (arXiv:2408.02666). EFT's file is not taught then."""
    eft_endpoint: str | None = None
    """Who judges for `endpoint`, and justifies for `ranked` or writes all for `self_taught` if given:
    `model@http://host/v1`, or a model's path."""
    eft_passes: int = Field(default=3, ge=1)
    """Judgments tried of each response, or of each two in either order; the first pass that agrees, or is right, is
    taken. Ours: the paper does not say."""
    eft_agree: Literal["strict", "top"] = "strict"
    """When a pass agrees: `strict` = no pair is inverted and one is in order; `top` = the best one has the highest
    score. Ours: the paper does not say."""
    eft_sampling: SamplingConfig = SamplingConfig(max_tokens=512)
    """How those judgments are drawn, and for `self_taught` the other requests and their answers."""
    heldout: str = "seed"
    """File or dataset of ranked groups that only measure the judge, or `seed`; or `split`: a share of EFT's groups."""
    heldout_share: float = Field(default=0.25, gt=0, lt=1)
    """Share that `heldout = split` takes (section 3.1.1: 541 of 2,171)."""
    evaluation: str = "seed"
    """File or dataset of prompts that only measure the policy, or `seed`."""
    ift_kinds: tuple[str, ...] = ()
    """Use IFT rows of these kinds only; empty = all."""
    ift_rows: int | None = Field(default=None, ge=1)
    """Use this many IFT rows, spread over the kinds; null = all."""
    eft_groups: int | None = Field(default=None, ge=1)
    """Use this many EFT groups, or instructions for `self_taught`, spread over the kinds; null = all."""
    keep_out: tuple[str, ...] = ()
    """More files or datasets whose prompts measure (AlpacaEval, MT-Bench, IFEval, …): like `heldout` and `evaluation`,
    neither they nor near copies of them are trained on."""
    eft_form: Literal["justified", "score"] = "justified"
    """What EFT teaches: justification then score line (the paper), or the score line alone (for the reading
    `expected` without justification). For `self_taught`, the explanation then the verdict line (for
    `judgments.comparisons_justified`), or the verdict line alone, which needs nobody to write it."""

    @model_validator(mode="after")
    def _an_endpoint_has_a_name(self) -> "SeedDataConfig":
        if self.eft_targets == "endpoint" and not self.eft_endpoint:
            raise ValueError(
                "seed_data.eft_targets=endpoint needs the model that judges. "
                "Set seed_data.eft_endpoint=model@http://host/v1."
            )
        if self.eft_endpoint and self.eft_targets not in ("endpoint", "ranked", "self_taught"):
            raise ValueError(
                "seed_data.eft_endpoint judges for eft_targets=endpoint or ranked, or writes for self_taught, and that "
                f"is {self.eft_targets!r}. Leave it out, or set eft_targets."
            )
        return self

    @property
    def eft_is_judged(self) -> bool:
        """Whether a model writes the judgments that EFT teaches, or what they are of."""
        return self.eft_targets in ("self", "endpoint", "self_taught") or (
            self.eft_targets == "ranked" and self.eft_form == "justified"
        )


class PromptsConfig(Settings):
    """New prompts (section 2.2, step 1; 8-shot Self-Instruct, arXiv:2212.10560)."""

    target: int = Field(default=1000, ge=0)
    """Self-written prompts kept per iteration. Ours: the paper does not say."""
    seed_demonstrations: int = Field(default=6, ge=1)
    """Demonstrations from the seed instructions (section 3.1.3)."""
    generated_demonstrations: int = Field(default=2, ge=0)
    """Demonstrations from prompts generated earlier (section 3.1.3)."""
    demonstration_kinds: tuple[str, ...] = ()
    """Show seed instructions of these kinds only; empty = all. A small model writes after what it sees: plain tasks."""
    form: Literal["completion", "chat"] = "completion"
    """Ask as raw text to continue, or as a user's turn. Small models need `completion`."""
    generator: Literal["policy", "base"] | str = "policy"
    """Who writes: the policy, the base model, or the path of a fixed model (the paper: a fixed chat model)."""
    per_request: int = Field(default=1, ge=1)
    """New prompts read from one completion."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.9, max_tokens=160)
    """Section 3.1.3: T = 0.6, p = 0.9. max_tokens is per new prompt."""
    max_similarity: float = Field(default=0.7, gt=0, le=1)
    """Drop a prompt whose ROUGE-L F against any seed or kept prompt is above this (Self-Instruct)."""
    min_words: int = Field(default=4, ge=1)
    """Fewest words: Self-Instruct keeps more than 3."""
    max_words: int = Field(default=150, ge=1)
    """Most words (Self-Instruct)."""
    max_attempts: float = Field(default=5.0, ge=1)
    """Stop asking after target times this many requested prompts, even if fewer were kept."""
    file: str | None = None
    """Prompts of your own (JSON lines with `prompt`, or one per line in .txt), mixed in."""
    file_share: float = Field(default=0.0, ge=0, le=1)
    """Share of an iteration's prompts that comes from `file`; each prompt is used in one iteration only."""

    @model_validator(mode="after")
    def _file_and_share_come_together(self) -> "PromptsConfig":
        if (self.file is None) != (self.file_share == 0):
            raise ValueError(
                f"prompts.file and prompts.file_share go together, got file={self.file!r}, "
                f"file_share={self.file_share}. Set both, or neither."
            )
        if self.min_words > self.max_words:
            raise ValueError(f"prompts.min_words ({self.min_words}) is above prompts.max_words ({self.max_words}).")
        return self


class ResponsesConfig(Settings):
    """N responses to each prompt (section 2.2, step 2)."""

    n: int = Field(default=4, ge=1)
    """Responses per prompt (section 3.1.3: 4)."""
    sampling: SamplingConfig = SamplingConfig()


class JudgmentsConfig(Settings):
    """K judgments of each response (section 2.2, step 2; rubric: figure 2)."""

    k: int = Field(default=3, ge=1)
    """Judgments per response, averaged (section 3.1.3: 3). A higher K later adds the missing passes only."""
    reading: Literal["text", "guided", "expected"] = "text"
    """`text`: read the score from the judgment (the paper). `guided`: justification written freely, score line
    completed under a constraint, always readable. `expected`: probability-weighted mean over the score tokens."""
    justified: bool = True
    """Write a justification before the score. False only with `expected`; then all passes are equal and k must be 1."""
    rubric: str = "additive"
    """Name of a template in srlm_core/rubrics, or the path of your own."""
    steps: Literal["min", "mean", "last"] | None = None
    """Score a response step by step, each after those before it (arXiv:2503.03746, whose judge compares two next steps;
    scores are ours): what the steps' scores come to. The steps are asked for by the rubric `step`; EFT teaches scores
    of whole responses all the same. null = score the whole response."""
    comparisons_justified: bool = False
    """Explain before saying which of two responses is better, where the policy or judge compares; the explanation is
    drawn by `sampling`. Ours. False = the verdict is read at once."""
    judge: str = "policy"
    """Who judges: `policy` (the paper), `base`, or the path of a frozen model."""
    sampling: SamplingConfig = SamplingConfig(max_tokens=512)
    """Budget of one judgment. Shorter ones cut the text before the score."""
    min_valid: int | None = Field(default=None, ge=1)
    """Readable judgments a response needs to have a score; null = half of k, rounded up."""

    @model_validator(mode="after")
    def _reading_fits_passes(self) -> "JudgmentsConfig":
        if not self.justified and self.reading != "expected":
            raise ValueError(f"judgments.justified=false works only with reading='expected', got {self.reading!r}.")
        if not self.justified and self.k != 1:
            raise ValueError(
                f"judgments.k={self.k} with justified=false: without a justification all passes are equal. "
                "Set judgments.k=1."
            )
        if self.min_valid is not None and self.min_valid > self.k:
            raise ValueError(
                f"judgments.min_valid={self.min_valid} is more than judgments.k={self.k}: "
                "no response would have a score."
            )
        return self

    @property
    def required(self) -> int:
        """Readable judgments needed for a score."""
        return self.min_valid or (self.k + 1) // 2


class PairsConfig(Settings):
    """Chosen and rejected (section 2.2: highest against lowest; equal scores are dropped)."""

    truncated_rejected: bool = False
    """Let a response that was cut at max_tokens be rejected. It is never chosen."""
    min_margin: float = Field(default=0.0, ge=0)
    """Smallest score difference of a pair, rubric points. 0 = any difference (the paper)."""
    length_control: float = Field(default=0.0, ge=0, lt=0.5)
    """rho of Meta-Rewarding (arXiv:2407.19594): of the scores within this share of the range from the top the shortest
    response is chosen, of those within it from the bottom the longest is rejected; from 0.5 on the two would overlap.
    0 = highest against lowest."""
    max_chosen_chars: int | None = Field(default=None, ge=1)
    """A longer response is never chosen, characters (arXiv:2407.19594: 2,500 in the first iteration); null = off."""
    max_repetition: float = Field(default=0.5, ge=0, le=1)
    """A response whose word 4-grams repeat more than this share is never chosen (arXiv:2404.03715 section 5.1);
    1 = off."""


class MetaConfig(Settings):
    """The judge of judgments (Meta-Rewarding, arXiv:2407.19594); for method `meta_rewarding`."""

    trains_judge: bool = True
    """Compare judgments and train on the better ones, too; False = on responses alone (their iterations 3 and 4)."""
    reading: Literal["text", "expected"] = "text"
    """`text`: an explanation whose last line names the winner (the paper). `expected`: p(A wins), read off."""
    rubric: str = "meta"
    """Name of a template in srlm_core/rubrics, or the path of your own."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, top_p=0.95, max_tokens=512)
    """How comparisons are drawn."""
    regularisation: float = Field(default=0.1, gt=0)
    """L2 term of the ratings, ours: without one, a judgment that wins all or none has no finite rating."""
    max_chosen_chars: int | None = Field(default=None, ge=1)
    """Drop a pair whose chosen judgment is longer, characters (theirs: 1,100, then 1,000); null = off."""
    max_score_share: float = Field(default=1.0, gt=0, le=1)
    """Largest share of the pairs whose chosen judgments give one score, against a judge that learns to give it always;
    1 = off. Ours."""


class RlaifConfig(Settings):
    """Critique, revision and preference under principles (Constitutional AI, arXiv:2212.08073); for method `rlaif`."""

    principles: str = "harmless"
    """Name of a file in srlm_core/principles, or the path of your own: one a line."""
    rounds: int = Field(default=4, ge=1)
    """Critiques and revisions of each answer (section 3.1: 4), each under a principle drawn anew."""
    justified: bool = False
    """Let the judge explain before it says which is better (section 4.1, chain of thought)."""
    explanation_tokens: int = Field(default=256, ge=1)
    """Longest explanation."""
    clamp: float = Field(default=0.4, ge=0, lt=0.5)
    """With explanations p is kept within clamp .. 1 - clamp (section 4.3: 0.4), for they make the judge too sure."""
    labels: Literal["soft", "hard"] = "soft"
    """What a pair is worth: p (the paper found soft labels the better ones), or 1."""


class CreamConfig(Settings):
    """How far a label is trusted (CREAM, arXiv:2410.12735 section 3); for method `cream`."""

    consistency: Literal["kendall", "spearman", "top_order"] = "kendall"
    """How the rankings of M_t and M_{t-1} are compared: Kendall's tau-b, Spearman's rho, or whether both the best and
    the worst response are the same ones."""
    per: Literal["dataset", "pair"] = "dataset"
    """One C for all pairs, the mean over prompts, or each prompt's own (the mean where that is undefined)."""


class DnoConfig(Settings):
    """Which pairs have a large margin (Direct Nash Optimization, arXiv:2404.03715 section 5.1); for method `dno`."""

    judge_by: Literal["score", "win_rate"] = "score"
    """What a response is worth: the judge's `score`, of responses and references alike (the paper, which shows it all
    of a prompt at once), or its `win_rate` against the others of its prompt, compared in both orders."""
    min_positive: float = Field(default=4.0, ge=0, le=5)
    """Smallest score of a chosen response, rubric points (theirs: 5, on a scale to 6). For `score`."""
    reference_margin: float = Field(default=2.0, gt=0)
    """Smallest lead of a reference that is chosen, rubric points (theirs: 2 of 6). For `score`."""
    own_margin: float = Field(default=1.0, gt=0)
    """Smallest lead of a response of the policy that is chosen, rubric points (theirs: 1 of 6). For `score`."""
    win_margin: float = Field(default=0.2, gt=0, le=1)
    """Smallest lead of any that is chosen, in win rate. For `win_rate`. Ours."""
    restrictive: bool = False
    """Choose references alone, against the policy's responses (their DNO-Restrictive)."""
    max_pairs_per_prompt: int | None = Field(default=None, ge=1)
    """Take the pairs of the largest lead, at most so many of a prompt; null = all (the paper). Ours."""


class DiceConfig(Settings):
    """The reward that DPO leaves in a model (DICE, arXiv:2406.09760); for method `dice`. beta is training.dpo.beta."""

    alpha: float = Field(default=0.001, ge=0)
    """Reward taken off for each token of a response, against growing length; 0 = none. Ours: theirs is not known."""


class RlhfConfig(Settings):
    """Whose reward counts; for methods `rlhf` and `rlhf_online`. How one is trained is training.reward."""

    reward_model: str | None = None
    """A reward model of your own (a folder or hub id; one number a response, …ForSequenceClassification); null = one is
    trained on EFT's rankings, from M1."""

    @model_validator(mode="after")
    def _it_is_loaded_here(self) -> "RlhfConfig":
        if self.reward_model and "@http" in self.reward_model:
            raise ValueError(
                f"rlhf.reward_model: expected a folder or a hub id, got {self.reward_model!r}: an endpoint tells no "
                "rewards. Name a checkpoint, or let the endpoint judge: method=self_rewarding with judgments.judge."
            )
        return self


class TemporalConfig(Settings):
    """Pairs further apart than M_t's own responses (Temporal Self-Rewarding, known to us from one note).

    For methods whose judge scores single responses. Each further model answers every prompt `responses.n` times.
    """

    rejected_from: Literal["base", "sft"] | None = None
    """An early model, M0 or M1: where its worst response scores below M_t's worst, that one is rejected. null = off."""
    chosen_from_future: bool = False
    """Train a future model on the pairs so far, for a while: where its best response scores above M_t's best, by the
    same judge, that one is chosen. M_{t+1} is trained on those pairs, and does not go on from it."""

    @property
    def on(self) -> bool:
        """Whether another model answers at all."""
        return self.rejected_from is not None or self.chosen_from_future


class OptimizerConfig(Settings):
    """One training run."""

    learning_rate: float = Field(gt=0)
    final_learning_rate: float = Field(ge=0)
    """Where the cosine ends."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step (section 3.1.3: 16), over all devices."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Rows per forward pass of one device; changes memory, not the result."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the rows. Ours: the paper does not say."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_length: int = Field(default=2048, ge=16)
    """Longest row, tokens. Longer rows are left out and counted before training, never cut."""
    lora_rank: int = Field(default=0, ge=0)
    """0 = full weights; else LoRA of this rank, merged before the model becomes the next reference."""
    heldout_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of prompts kept out of training to choose among checkpoints; 0 = no early stopping."""
    patience: int = Field(default=2, ge=1)
    """Checkpoints without a better held-out check before training stops (needs heldout_share)."""
    checkpoint_every_s: int = Field(default=180, ge=1)
    """Seconds between checkpoints: what a crash costs at most."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints (section 3.1.3: 200), if that comes sooner."""
    gradient_checkpointing: bool = False
    """Recompute activations: slower, less memory."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the forward and backward pass. Weights stay float32 while they are updated."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """What M_t is stored in. bfloat16 halves the disk and swallows steps of 1e-6 between iterations."""


class SftConfig(OptimizerConfig):
    """Supervised fine-tuning of M0 on IFT (+ EFT) (section 3.1.3)."""

    learning_rate: float = Field(default=5.5e-6, gt=0)
    """Highest rate of a step (section 3.1.3: 5.5e-6, for 70B; a small model wants far more)."""
    final_learning_rate: float = Field(default=1.1e-6, ge=0)


class RewardConfig(OptimizerConfig):
    """A Bradley-Terry reward model, trained on rankings (arXiv:2203.02155 section 3.5); a row is a prompt."""

    learning_rate: float = Field(default=9e-6, gt=0)
    """InstructGPT, appendix C.2: 9e-6 for 6B."""
    final_learning_rate: float = Field(default=9e-7, ge=0)
    """Appendix C.2: the cosine ends at a tenth."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts per optimizer step, each with all its responses (appendix C.2: 64)."""
    margin: float = Field(default=0.0, ge=0)
    """Lead that the better response is to have, in reward. 0 = any (the paper)."""
    centre: float = Field(default=0.0, ge=0)
    """Weight of (sum of a pair's rewards)^2, which keeps them around 0. 0 = none (the paper)."""


class OnlineConfig(OptimizerConfig):
    """A policy gradient on rewards of fresh responses: RLOO (arXiv:2402.14740), in place of InstructGPT's PPO."""

    learning_rate: float = Field(default=1e-6, gt=0)
    final_learning_rate: float = Field(default=1e-7, ge=0)
    batch_size: int = Field(default=16, ge=1)
    """Prompts per optimizer step, each with `n` responses; prompts that fill no whole step are left out."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Responses per forward pass of one device; changes memory, not the result."""
    n: int = Field(default=4, ge=2)
    """Responses to a prompt: each is weighed against the mean reward of the others (section 3.2 of RLOO)."""
    sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=1.0, max_tokens=512)
    """How they are drawn: from the policy as it is, or its gradient would be another's."""
    kl: float = Field(default=0.05, ge=0)
    """Reward taken off for each nat that the policy lies above the reference (InstructGPT: 0.02). 0 = none."""
    clip: float = Field(default=0.2, gt=0)
    """How far a response's probability may move in one step, as a ratio (InstructGPT, appendix C.4: 0.2)."""
    init_from: Literal["previous", "sft", "base"] = "previous"
    """Weights that training starts from: M_t, M1, or M0."""
    reference: Literal["previous", "sft", "base"] = "sft"
    """Frozen model that `kl` is measured from (InstructGPT: the one after supervised fine-tuning)."""
    vllm: bool = False
    """Sample with vLLM inside the trainer (TRL's `colocate`), on GPUs; off = by transformers. Not tried yet: TRL says
    which versions of vLLM it knows."""

    @model_validator(mode="after")
    def _nothing_is_held_out(self) -> "OnlineConfig":
        if self.heldout_share:
            raise ValueError(
                f"training.online.heldout_share={self.heldout_share}: prompts have no answer to check by. Set it to 0."
            )
        if self.batch_size * self.n % self.micro_batch_size:
            raise ValueError(
                f"training.online: expected batch_size x n to be a multiple of micro_batch_size, got "
                f"{self.batch_size} x {self.n} and {self.micro_batch_size}. Change one of them."
            )
        return self


class ScirConfig(Settings):
    """Learning from what a model's two rewards agree on, SCIR-style; for `training.dpo.loss = scir`.

    The idea is that of arXiv:2502.08922, whose equations and settings are not known to us: all of these are ours.
    """

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the consistency term beside DPO's loss."""
    gamma: float = Field(default=0.1, ge=0)
    """Weight of the two rewards' entropies inside it: larger asks for more confidence."""
    delta: float = Field(default=0.0, ge=0, lt=0.5)
    """How far from 1/2 both probabilities must be for a pair to be learnt from. 0 = any way."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps at first in which the verdict alone says which response is better: where the reference is
    what training starts from, the log-ratios say nothing at step 0 but rounding."""
    stop_gradient: Literal["none", "generative", "implicit"] = "none"
    """Which reward the consistency term leaves as it is, so that the other one alone comes nearer."""


class DpoConfig(OptimizerConfig):
    """Direct preference optimisation (section 3.1.3; arXiv:2305.18290)."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Highest rate of a step (section 3.1.3: 1e-6, for 70B; a small model wants more)."""
    final_learning_rate: float = Field(default=1e-7, ge=0)
    beta: float = Field(default=0.1, gt=0)
    """Pull towards the reference (section 3.1.3: 0.1)."""
    loss: Literal["sigmoid", "sppo", "scir"] = "sigmoid"
    """What a pair costs. `sigmoid`: DPO by the pair's label, a hard one (the paper; arXiv:2305.18290 section 4) or a
    soft one (CREAM, arXiv:2410.12735). `sppo`: squared distance of each response's log-ratio from (its score - 1/2) /
    beta (arXiv:2405.00675 section 4; beta 0.001 there), where a score is a probability of winning. `scir`: for pairs
    that nobody labelled, SCIR-style (ours, after the idea of arXiv:2502.08922)."""
    scir: ScirConfig = ScirConfig()
    """For loss `scir`."""
    nll: float = Field(default=0.0, ge=0)
    """Weight of the chosen response's negative log-likelihood, nats per token of its own, beside the loss
    (arXiv:2404.19733 section 2: 1). 0 = none (the paper)."""
    init_from: Literal["previous", "sft", "base"] = "previous"
    """Weights that training starts from: M_t (the paper), M1, or M0."""
    reference: Literal["previous", "sft", "base"] = "previous"
    """Frozen model in the loss: M_t, M1, or M0. Not named in the paper; start-of-iteration is public practice."""
    data: Literal["latest", "last_two", "cumulative"] = "latest"
    """Pairs of this iteration, of this and the one before (SPIN), or of all iterations so far."""
    replay: float = Field(default=0.0, ge=0, le=1)
    """Beside the latest pairs, train on at most this share of those of the iteration before, half of that share of the
    one before it, and so on; drawn anew each time (arXiv:2404.03715 section 5.1: 0.3; the share's base, the pairs of
    that iteration, is ours). 0 = none."""

    @model_validator(mode="after")
    def _replay_adds_to_the_latest(self) -> "DpoConfig":
        if self.replay and self.data != "latest":
            raise ValueError(
                f"training.dpo.replay={self.replay} adds earlier pairs to the latest, and "
                f"training.dpo.data={self.data!r} has them all. Set one of the two."
            )
        return self

    @property
    def labelled(self) -> bool:
        """Whether the loss is told which response of a pair is better; else it asks the model."""
        return self.loss != "scir"

    @model_validator(mode="after")
    def _without_labels_none_is_chosen(self) -> "DpoConfig":
        for name in ("nll", "heldout_share"):
            if not self.labelled and getattr(self, name):
                raise ValueError(
                    f"training.dpo.loss={self.loss} is for pairs of which nobody said which response is better, and "
                    f"training.dpo.{name}={getattr(self, name)} has to know. Set {name}=0, or another loss."
                )
        return self


class TrainingConfig(Settings):
    """SFT at the start, DPO in each iteration; where the method has them, a reward model and a policy gradient."""

    launcher: Literal["single", "torchrun", "ray"] = "single"
    """Who starts the processes that train a model. `single`: one process. `torchrun`: PyTorch's elastic agent, several
    on this machine. `ray`: Ray Train, on the machines of the Ray cluster of `engine.ray_address` (none: on this one),
    which share the campaign's folder."""
    ranks: int = Field(default=1, ge=1)
    """Processes that train one model together, each on a GPU of its own, or on its share of the cores where there is no
    GPU. They share each step's `batch_size` rows: what a step sees and what its loss is does not change, only how sums
    are rounded."""
    fsdp: Literal["off", "full_shard", "shard_grad_op"] = "off"
    """What ranks on GPUs split between them (FSDP2): `off` nothing, each holds the whole model (DDP); `shard_grad_op`
    gradients and optimizer state; `full_shard` the weights, too. Not tried yet. While it loads, each rank holds a whole
    copy in the machine's memory."""
    sft: SftConfig = SftConfig()
    dpo: DpoConfig = DpoConfig()
    reward: RewardConfig = RewardConfig()
    online: OnlineConfig = OnlineConfig()
    keep_last: int | None = Field(default=None, ge=1)
    """Keep the weights of so many last M_t, of M0, and of whatever a later step loads; those of others are dropped as
    the campaign runs, and their rows and numbers stay. null = keep all."""

    @model_validator(mode="after")
    def _several_ranks_are_launched(self) -> "TrainingConfig":
        for name, value, alone in (("ranks", self.ranks, 1), ("fsdp", self.fsdp, "off")):
            if self.launcher == "single" and value != alone:
                raise ValueError(
                    f"training.{name}={value} is for several processes, and training.launcher=single starts one. Set "
                    f"training.launcher=torchrun or ray, or training.{name}={alone}."
                )
        return self


class SuitesConfig(Settings):
    """Published benchmarks that each measured model takes. Their questions are kept out of everything that trains."""

    alpaca_eval: str | None = None
    """The baseline's outputs of AlpacaEval 2 (alpaca_eval_gpt4_baseline.json, or a dataset); null = not taken."""
    arena_hard: str | None = None
    """Folder with Arena-Hard's question.jsonl and one baseline's answers: baseline.jsonl or model_answer/NAME.jsonl."""
    ifeval: str | None = None
    """IFEval's input_data.jsonl, or a dataset such as google/IFEval; needs `pip install 'srlm[suites]'`."""
    mt_bench: str | None = None
    """Folder with MT-Bench's question.jsonl and, where there are any, reference_answer*.jsonl; or that file."""
    capability: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, such as arc_challenge, gsm8k, mmlu (table 3); needs `srlm[suites]`, too."""
    capability_shots: int | None = Field(default=None, ge=0)
    """Examples shown before each of their questions; null = as each task says. The paper does not say."""
    capability_tasks: str | None = None
    """Folder of task files of your own, in the harness's form: `include` one of its tasks and name a local dataset."""
    questions: int | None = Field(default=None, ge=1)
    """Questions of each benchmark that are asked, spread over its categories; null = all."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.7, top_p=1.0, max_tokens=1024)
    """How answers are drawn. Where a benchmark prescribes a temperature, it holds: MT-Bench by category, IFEval and
    Arena-Hard 0."""
    annotator: str | None = None
    """Who judges AlpacaEval, MT-Bench and Arena-Hard: an endpoint as `model@http://host/v1`, a model's path, or `base`.
    null = answers are written for the official tools and judged by nobody."""
    annotation_tokens: int = Field(default=2048, ge=1)
    """Longest written verdict. One that is cut off is null."""

    @property
    def answered(self) -> bool:
        """Whether any benchmark is taken whose answers `sampling` draws; a capability task says itself how."""
        return any((self.alpaca_eval, self.arena_hard, self.ifeval, self.mt_bench))


class EvaluationConfig(Settings):
    """What is measured, and by whom."""

    models: Literal["all", "policy", "none"] = "all"
    """`all`: M0, sft_baseline and every M_t. `policy`: only M_t."""
    prompts: int | None = Field(default=None, ge=1)
    """Evaluation prompts used; null = all of the file."""
    heldout_groups: int | None = Field(default=None, ge=1)
    """Held-out ranked groups used; null = all."""
    text_judgments: int = Field(default=100, ge=0)
    """Held-out responses judged in the `text` form, whatever the loop reads, to report its readable rate."""
    order_groups: int = Field(default=40, ge=0)
    """Held-out groups whose best and worst response the model compares in both orders, to report how much it takes
    what is shown first."""
    own_groups: int = Field(default=40, ge=0)
    """Held-out groups whose prompt the model answers, too: where it places its own answer among people's, against where
    the frozen judge does, is its self-preference."""
    attacks: bool = True
    """Judge the responses that quote scores or give the judge orders, and report the mean shift."""
    refusals: bool = True
    """Ask the shipped harmful requests, and harmless ones that sound like them, and report how many are refused."""
    sampling: SamplingConfig = SamplingConfig()
    judge: str = "base"
    """Frozen judge of head-to-heads: `base` (M0), a model path, or an endpoint as `model@http://host/v1`."""
    more_judges: tuple[str, ...] = ()
    """Further judges of the same answers, named likewise; the report says how far they agree with the first."""
    head_to_head: Annotated[tuple[str, ...], Field()] = ("chain", "sft_baseline")
    """Comparisons: `chain` (each M_t against the one before), or a model that every M_t meets."""
    bootstrap_samples: int = Field(default=1000, ge=10)
    """Resamples of prompts behind each standard error of a correlation."""
    suites: SuitesConfig = SuitesConfig()
    """Published benchmarks."""


class Scheduled(Settings):
    """Settings that change on the way."""

    iteration: int = Field(ge=2)
    """The first iteration in which they hold; they hold in later ones, too."""
    set: dict[str, Any]
    """Dotted names to values, such as `{ "pairs.length_control" = 0.32 }`."""


class GatesConfig(Settings):
    """What a model M_t must keep to: asked before M_t+1 is trained, and of the last model once it is measured.

    Null = not checked; what could not be measured neither passes nor fails. The first three are counts of everything
    that an iteration made: the number itself decides. The next three are of samples: a gate fails where the number is
    past its limit by more than two standard errors, and one value alone, whose error nobody knows, decides nothing.
    """

    min_readable_rate: float | None = Field(default=None, ge=0, le=1)
    """Smallest share of the iteration's judgments that could be read."""
    max_tie_rate: float | None = Field(default=None, ge=0, le=1)
    """Largest share of prompts without a pair because all scores are equal, of those that reached pairing."""
    min_pairs_yield: float | None = Field(default=None, ge=0, le=1)
    """Smallest share of prompts that gave a pair, of those that reached pairing."""
    max_length_growth: float | None = Field(default=None, gt=0)
    """Largest mean length of M_t's answers over that of M1's to the same evaluation prompts: a ratio of tokens."""
    min_win_rate: float | None = Field(default=None, ge=0, le=1)
    """Smallest share of points of M_t head to head against M_t-1, both orders, a tie one half, by evaluation.judge.
    Set, it is played in iteration t, for which a judge that is a local model starts an engine once an iteration."""
    max_capability_drop: float | None = Field(default=None, ge=0, le=100)
    """Largest fall from M1 to M_t in the mean of the tasks of evaluation.suites.capability, in percentage points on
    the same questions."""
    goodhart: bool = False
    """Fails where M_t's mean score of its own responses is above M_t-1's while its agreement with people's ranks
    (held-out pairwise accuracy) is below, both by more than the standard error of the difference."""
    stop: bool = True
    """A gate that fails ends the campaign; with its limit changed the same command goes on. False = it is only told."""
    approval: bool = False
    """Between two iterations, wait for a person: from the Prefect UI where there is one, else by `srlm approve`."""

    @property
    def of_evaluation(self) -> list[str]:
        """Name the gates that are set and rest on what evaluation measures."""
        named = ("max_length_growth", "min_win_rate", "max_capability_drop")
        return [name for name in named if getattr(self, name) is not None] + ["goodhart"] * self.goodhart

    @property
    def asked(self) -> bool:
        """Whether any gate is set."""
        counted = (self.min_readable_rate, self.max_tie_rate, self.min_pairs_yield)
        return bool(self.of_evaluation) or any(limit is not None for limit in counted)


class TrackingConfig(Settings):
    """MLflow and Prefect; neither is needed."""

    mlflow_uri: str | None = None
    """Tracking server; null = SQLite beside the campaigns."""
    experiment: str = "srlm"
    upload_below_mb: float = Field(default=1024.0, ge=0)
    """Checkpoints smaller than this go into MLflow; larger ones are referenced by path and digest."""
    registered_model: str | None = Field(default=None, pattern="^[^/:'\"]+$")
    """Model in MLflow's registry of which every M_t is a version; null = the campaign's name. The alias `champion`
    moves to M_t when its gates pass: at least one was measured, and none failed."""


class StorageConfig(Settings):
    """Where finished work is kept besides the campaign's folder."""

    mirror: str | None = None
    """Object storage, as a URL that fsspec knows (`s3://bucket/prefix`): finished parts and models are copied to NAME
    under it, and fetched from there where the folder lacks them. Credentials come from the environment. null = none."""


class RunConfig(Settings):
    """A campaign, every default spelled out."""

    recipe: str = "self_rewarding"
    size: str = "small"
    method: str = "self_rewarding"
    """The algorithm: the name of a module of srlm_core/methods."""
    seed: int = 0
    """Every random choice derives from it."""
    iterations: int = Field(default=2, ge=0)
    """DPO iterations: 2 ends at M3 (section 3.2)."""
    schedule: tuple[Scheduled, ...] = ()
    """What changes from some iteration on: settings of `responses`, `judgments`, `pairs`, `temporal`, `training.dpo`
    and the method's own."""
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    seed_data: SeedDataConfig = SeedDataConfig()
    prompts: PromptsConfig = PromptsConfig()
    responses: ResponsesConfig = ResponsesConfig()
    judgments: JudgmentsConfig = JudgmentsConfig()
    pairs: PairsConfig = PairsConfig()
    meta: MetaConfig = MetaConfig()
    cream: CreamConfig = CreamConfig()
    rlaif: RlaifConfig = RlaifConfig()
    dno: DnoConfig = DnoConfig()
    dice: DiceConfig = DiceConfig()
    rlhf: RlhfConfig = RlhfConfig()
    temporal: TemporalConfig = TemporalConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gates: GatesConfig = GatesConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _budgets_fit_the_context(self) -> "RunConfig":
        suites = self.evaluation.suites
        for name, sampling in (
            ("prompts.sampling", self.prompts.sampling),
            ("responses.sampling", self.responses.sampling),
            ("judgments.sampling", self.judgments.sampling),
            ("evaluation.sampling", self.evaluation.sampling),
            *([("meta.sampling", self.meta.sampling)] if self.method == "meta_rewarding" else []),
            *([("evaluation.suites.sampling", suites.sampling)] if suites.answered else []),
            *([("seed_data.eft_sampling", self.seed_data.eft_sampling)] if self.seed_data.eft_is_judged else []),
            *([("training.online.sampling", self.training.online.sampling)] if self.method == "rlhf_online" else []),
        ):
            if sampling.max_tokens >= self.engine.context:
                raise ValueError(
                    f"{name}.max_tokens={sampling.max_tokens} leaves no room for a prompt in "
                    f"engine.context={self.engine.context}. Raise the context or lower max_tokens."
                )
        return self

    @model_validator(mode="after")
    def _gates_can_be_measured(self) -> "RunConfig":
        rests = self.gates.of_evaluation
        if rests and self.evaluation.models == "none":
            raise ValueError(
                f"gates.{rests[0]} rests on what evaluation measures, and evaluation.models=none. Set "
                "evaluation.models=policy, or leave that gate out."
            )
        if self.gates.max_capability_drop is not None and not self.evaluation.suites.capability:
            raise ValueError(
                f"gates.max_capability_drop={self.gates.max_capability_drop} rests on evaluation.suites.capability, "
                "which names no task. Name some, or leave that gate out."
            )
        return self

    @model_validator(mode="after")
    def _what_is_scheduled_can_be_set(self) -> "RunConfig":
        for change in self.schedule:
            for name in change.set:
                if not name.startswith(SCHEDULABLE):
                    raise ValueError(
                        f"schedule: expected settings under {', '.join(SCHEDULABLE)}, got {name!r} for iteration "
                        f"{change.iteration}: it is the same for a whole campaign."
                    )
            self.at(change.iteration)
        return self

    def at(self, t: int) -> "RunConfig":
        """Return the settings as they are in iteration t: the schedule is carried out, and gone."""
        if not self.schedule:
            return self
        settings = self.model_dump(exclude={"schedule"})
        for change in sorted(self.schedule, key=lambda change: change.iteration):
            for name, value in change.set.items() if change.iteration <= t else ():
                *nodes, last = name.split(".")
                functools.reduce(lambda node, key: node.setdefault(key, {}), nodes, settings)[last] = value
        return type(self).model_validate(settings)


SCHEDULABLE = ("responses.", "judgments.", "pairs.", "meta.", "cream.", "dno.", "dice.", "temporal.", "training.dpo.")
"""Where settings lie that may change from iteration to iteration."""


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, for editors: settings for all sizes, and `sizes` that change some."""
    settings = RunConfig.model_json_schema()
    description = {"type": "string", "description": "What this size is for, how long it takes."}
    like = {"type": "string", "description": "Another size of the recipe, whose settings hold where this says nothing."}
    size = {"type": "object", "properties": {**settings["properties"], "description": description, "like": like}}
    sizes = {"type": "object", "additionalProperties": size}
    extends = {"type": "string", "description": "Recipe whose settings and sizes hold where this one says nothing."}
    properties = {"extends": extends, **settings["properties"], "sizes": sizes}
    return {**settings, "title": "srlm recipe", "properties": properties}
