"""simulation: methods tried on a judge whose flaws are known, in a world of numbers without a language model. Ours.

The world. A response is a point: merit, length (log), how like the policy's own manner it is, and many further features
that nobody prefers, all in standard deviations of what the policy says to one prompt, counted from M_1's mean. True
quality is merit in points, less a cost of what the policy drifted in the further features. A policy is the mean of such
points; its spread stays.

Training. `E[T] <- E[T] + step * mean over prompts of (2 C - 1) (T(chosen) - T(rejected))`, T the statistics of an
exponential family: for the policy the features themselves. It is DPO's gradient at Delta = 0, where the reference is
the policy, followed once in the family's own metric (a natural gradient); C is a pair's label, 1 for plain DPO, and
sigma(0) - C = -(2 C - 1) / 2 the gradient's factor. One step, because a second needs an optimiser to be assumed. A
prompt without a pair adds nothing. The policy as judge is trained by the same rule: T is then what it writes about a
response, regressed on what it may be biased by, and the square of its deviation.

The flaws, their strengths, the step and all else in World were settled with the two yardsticks (random labels lose in
four iterations about what a perfect judge gains) and committed before any two methods were compared; they are not
tuned to the answers. The same draws serve all arms and strengths of a seed, so differences are paired by seed.

What methods have as pure functions is used: pairs.extremes, logprobs.correlation, meta_judgments.battle_matrix,
position_wins and elo, and rho, its schedule and the settings of a rating from the shipped recipes.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from srlm_core import logprobs, meta_judgments, pairs, recipes
from srlm_core.config import RunConfig
from srlm_core.store import seed_for

MERIT, LENGTH, MANNER, NAMED = 0, 1, 2, 3
"""Columns of a response's features; from NAMED on, those that nobody prefers."""


@dataclass(frozen=True)
class World:
    """What holds for all methods alike. Points are the rubric's, 0 to 5."""

    prompts: int = 64
    """Of one iteration; every iteration has new ones."""
    responses: int = 5
    """N, for every arm."""
    judgments: int = 5
    """K, for every arm that judges."""
    iterations: int = 4
    """Meta-Rewarding's; M_5 is the end."""
    step: float = 0.25
    """How far one training goes along mean chosen - rejected."""
    start: float = 2.5
    """True quality of M_1, points."""
    prompt_spread: float = 0.5
    """Prompts differ in what can be reached, points (sd)."""
    merit: float = 0.7
    """Points of one sd of merit; responses to one prompt differ by this much (sd)."""
    characters: float = 1000.0
    """Median length of M_1's responses."""
    log_length: float = 0.4
    """Sd of the logarithm of length within a prompt."""
    foreign: float = -2.0
    """How like the policy's own manner a foreign response is, sd; own ones of M_1: 0."""
    others: int = 1024
    """Features that nobody prefers. Many against the pairs: most of what a training changes is by chance."""
    drift_cost: float = 0.2
    """Points for a nat of KL(M_t || M_1) in them (over-optimisation, as in arXiv:2210.10760)."""
    noise: float = 0.7
    """Noise of a judge that has another flaw, or none; as much as responses differ by."""
    lasting: float = 0.5
    """Share of a noise's variance that is of the response, and the same whenever this model reads it."""
    insight: float = 0.5
    """Share of a judge's lasting errors that it is free of where it compares judgments: that checking is easier than
    judging is Meta-Rewarding's premise."""
    sft_chance: float = 1.0
    """Sd in the other features of the way from M_0 to M_1, for one of merit: how impure CREAM's first reward is."""
    likelihood: float = 0.3
    """Correlation of M_0's likelihood with merit, by which M_0 ranks for CREAM."""
    heldout: int = 128
    """Pairs by which a judge's error is measured: both own, or in every second one a foreign one; always the same."""


@dataclass(frozen=True)
class Judge:
    """What stands between true quality and the points that are written. All in points."""

    lasting: float
    """Sd of the misreading of a response that all its judgments share."""
    fresh: float
    """Sd of what each judgment adds."""
    length: float = 0.0
    """Points for an sd of log length."""
    position: float = 0.0
    """Lead, in a comparison, of what is shown first."""
    leniency: float = 0.0
    """Shift of all points; 5 stays the most, so the top is compressed."""
    self_preference: float = 0.0
    """Points for an sd of likeness to the policy's own manner."""

    @property
    def noise(self) -> float:
        """Sd of one reading."""
        return math.hypot(self.lasting, self.fresh)


class Flaw(NamedTuple):
    """A flaw and the strengths it is tried at."""

    what: str
    unit: str
    strengths: tuple[float, ...]


FLAWS: Mapping[str, Flaw] = {
    "noise": Flaw("noise", "points, sd of one judgment", (0, 0.7, 1.4, 2.8)),
    "length": Flaw("length bias", "points for one sd of log length", (0, 0.35, 0.7, 1.4)),
    "position": Flaw("position bias", "points for being shown first", (0, 0.5, 1, 2)),
    "leniency": Flaw("leniency", "points added, 5 stays the most", (0, 1, 2, 3)),
    "self_preference": Flaw("self-preference", "points for one sd of own manner", (0, 0.35, 0.7, 1.4)),
}
"""By the Judge's field. Length and manner are tried at half, once and twice what merit is worth."""


def judge_with(world: World, flaw: str, strength: float) -> Judge:
    """Make a judge with one flaw, and the world's noise beside it where that is not the flaw."""
    noise = strength if flaw == "noise" else world.noise
    judge = Judge(lasting=noise * math.sqrt(world.lasting), fresh=noise * math.sqrt(1 - world.lasting))
    return judge if flaw == "noise" else replace(judge, **{flaw: strength})


# --- one iteration, as its arm sees it ------------------------------------------------------------------------------


class Draws(NamedTuple):
    """What chance gives to one iteration of one seed, standard normal throughout; the same for all arms."""

    features: np.ndarray
    """[prompts, responses, features], float32: where responses lie around the policy's mean."""
    prompt: np.ndarray
    """[prompts]."""
    lasting: np.ndarray
    """[prompts, responses]."""
    passes: np.ndarray
    """[prompts, responses, judgments]."""
    now: np.ndarray
    """[prompts, responses]: what M_t adds where it scores by likelihood."""
    before: np.ndarray
    """[prompts, responses]: what M_{t-1} adds."""
    likelihood: np.ndarray
    """[prompts, responses]: what M_0's likelihood tells beside merit."""
    lot: np.ndarray
    """[prompts, responses]."""
    meetings: np.ndarray
    """[prompts, judgments, judgments]: of each comparison of two judgments."""


@functools.lru_cache(maxsize=16)  # a seed's draws, while its cases are run
def draw(seed: int, where: str, prompts: int, responses: int, judgments: int, others: int) -> Draws:
    """Draw an iteration's chance; `where` names it."""
    random = np.random.default_rng(seed_for(seed, "simulate", where))
    each = (prompts, responses)
    features = random.standard_normal((*each, NAMED + others), dtype=np.float32)
    shapes = ((prompts,), each, (*each, judgments), each, each, each, each, (prompts, judgments, judgments))
    return Draws(features, *(random.standard_normal(shape) for shape in shapes))


class State(NamedTuple):
    """A policy, the judge it is, and what came before; means as [features], counted from M_1."""

    mean: np.ndarray
    judge: Judge
    base: np.ndarray
    """Of M_0."""
    before: np.ndarray | None
    """Of M_{t-1}; null: it is M_0."""


class Turn(NamedTuple):
    """What an arm is handed: the responses of one iteration, or the held-out ones."""

    t: int
    world: World
    state: State
    draws: Draws
    named: np.ndarray
    """[prompts, responses, 3]: merit, length and manner."""
    quality: np.ndarray
    """[prompts, responses], points."""


def drift(mean: np.ndarray) -> float:
    """Return KL(M_t || M_1) in the features that nobody prefers, nats: half the squared distance."""
    return 0.5 * float(np.square(mean[NAMED:]).sum())


def quality_of(mean: np.ndarray, world: World) -> float:
    """Return the mean true quality of what a policy says, points."""
    return world.start + world.merit * float(mean[MERIT]) - world.drift_cost * drift(mean)


def respond(world: World, state: State, draws: Draws, t: int) -> Turn:
    """Let the policy answer the iteration's prompts."""
    named = state.mean[:NAMED] + draws.features[..., :NAMED]
    level = world.start - world.drift_cost * drift(state.mean)
    return Turn(t, world, state, draws, named, level + _worth(world, draws, named))


def held_out(world: World, state: State, draws: Draws, t: int) -> Turn:
    """Lay out the held-out responses: M_1's own, and in every second prompt the second one foreign."""
    named = draws.features[..., :NAMED].astype(np.float64)
    named[1::2, 1, MANNER] += world.foreign
    return Turn(t, world, state, draws, named, world.start + _worth(world, draws, named))


def _worth(world: World, draws: Draws, named: np.ndarray) -> np.ndarray:
    return world.prompt_spread * draws.prompt[:, None] + world.merit * named[..., MERIT]


# --- what scores responses ------------------------------------------------------------------------------------------


def misreading(turn: Turn) -> np.ndarray:
    """Return by how much the judge errs on a response whenever it reads it; [prompts, responses], points."""
    judge = turn.state.judge
    taste = judge.length * turn.named[..., LENGTH] + judge.self_preference * turn.named[..., MANNER]
    return judge.leniency + taste + judge.lasting * turn.draws.lasting


def written(turn: Turn) -> np.ndarray:
    """Judge each response K times; [prompts, responses, judgments], whole points from 0 to 5."""
    read = (turn.quality + misreading(turn))[..., None] + turn.state.judge.fresh * turn.draws.passes
    return np.clip(np.rint(read), 0, 5)


def by_judge(turn: Turn) -> np.ndarray:
    """Score by the mean of the judgments (arXiv:2401.10020 section 2.2)."""
    return written(turn).mean(-1)


def by_truth(turn: Turn) -> np.ndarray:
    """Score by true quality."""
    return turn.quality


def by_lot(turn: Turn) -> np.ndarray:
    """Score by chance."""
    return turn.draws.lot


def rewards(turn: Turn) -> tuple[np.ndarray, np.ndarray]:
    """Return CREAM's rewards by M_t and by M_{t-1} (arXiv:2410.12735); [prompts, responses], up to a prompt's constant.

    Of two such policies the log-ratio to M_0 is linear in the features, along the way from M_0: all that the model was
    trained towards so far. To this comes noise, as large against the reward's spread as the judge's against merit's,
    of which the lasting share is common to both models. M_0 itself ranks by its likelihood.
    """
    draws, state = turn.draws, turn.state

    def read(of: np.ndarray, spread: float, fresh: np.ndarray) -> np.ndarray:
        astray = state.judge.lasting * draws.lasting + state.judge.fresh * fresh
        return of + spread / turn.world.merit * astray

    def ratio(mean: np.ndarray, fresh: np.ndarray) -> np.ndarray:
        way = mean - state.base
        along = turn.named @ way[:NAMED] + draws.features[..., NAMED:] @ way[NAMED:].astype(np.float32)
        return read(along, float(np.linalg.norm(way)), fresh)

    now = ratio(state.mean, draws.now)
    if state.before is not None:
        return now, ratio(state.before, draws.before)
    told = turn.world.likelihood
    return now, read(told * draws.features[..., MERIT] + math.sqrt(1 - told**2) * draws.likelihood, 1.0, draws.before)


def by_likelihood(turn: Turn) -> np.ndarray:
    """Score by CREAM's reward."""
    return rewards(turn)[0]


def consistencies(turn: Turn) -> np.ndarray:
    """Return CREAM's C of each prompt, (tau + 1) / 2 of the two rankings; [prompts]."""
    by = recipe("cream", turn.t).cream.consistency
    now, before = rewards(turn)
    orders = np.take_along_axis(now, before.argsort(-1), -1).argsort(-1).argsort(-1)
    return (np.array([_correlation(tuple(order), by) for order in orders.tolist()]) + 1) / 2


def consistency(turn: Turn) -> float:
    """Return CREAM's C of the data set, the mean over prompts."""
    return float(consistencies(turn).mean())


@functools.cache
def _correlation(ranks: tuple[int, ...], by: logprobs.Agreement) -> float:
    """Correlate rankings, the other being in order: without ties it depends on nothing else, and few are possible."""
    return logprobs.correlation(ranks, range(len(ranks)), by) or 0.0


@functools.cache
def recipe(name: str, t: int) -> RunConfig:
    """Return a shipped recipe's settings in iteration t."""
    return recipes.load(name).at(t)


# --- the judge of judgments -----------------------------------------------------------------------------------------


def meta_judged(turn: Turn) -> Judge:
    """Train the judge on its own judgments (arXiv:2407.19594): best against worst of one response a prompt.

    It is the response whose judgments vary most; all pairs of its judgments meet in both orders, and that one wins
    whose points are nearer to what the same model reads when it compares: the truth, its lasting errors less the share
    that it sees through, and fresh noise. Then E[T] moves as all else does: points on (1, length, manner), by their
    regression, and the squared deviation from the judge's own mean.
    """
    prompts = np.arange(len(turn.quality))
    of = written(turn).var(-1).argmax(-1)
    points = written(turn)[prompts, of]
    chosen, rejected = _best_and_worst(points, _outcomes(turn, points, of), recipe("meta_rewarding", turn.t))
    taste = np.column_stack([np.ones(len(of)), turn.named[prompts, of][:, [LENGTH, MANNER]]])
    gap = points[prompts, chosen] - points[prompts, rejected]
    leniency, length, manner = turn.world.step * np.linalg.lstsq(taste, gap, rcond=None)[0]
    far = np.square(points - points.mean(-1, keepdims=True))
    wider = turn.world.step * (far[prompts, chosen] - far[prompts, rejected]).mean()
    judge = turn.state.judge
    return replace(
        judge,
        leniency=judge.leniency + float(leniency),
        length=judge.length + float(length),
        self_preference=judge.self_preference + float(manner),
        fresh=math.sqrt(max(judge.fresh**2 + float(wider), min(judge.fresh**2, 0.01))),
    )


def _outcomes(turn: Turn, points: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Compare all judgments of one response a prompt; [prompts, first, second], +1 where the first wins, 0 a tie."""
    prompts = np.arange(len(of))
    judge = turn.state.judge
    known = (turn.quality + (1 - turn.world.insight) * misreading(turn))[prompts, of]
    read = np.clip(known[:, None, None] + judge.fresh * turn.draws.meetings, 0, 5)
    first, second = points[:, :, None], points[:, None, :]
    lead = np.abs(second - read) - np.abs(first - read) + judge.position
    lead[:, range(points.shape[1]), range(points.shape[1])] = 0
    return np.sign(np.where(np.abs(lead) < 1e-9, 0, lead))


def _best_and_worst(points: np.ndarray, won: np.ndarray, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rate judgments as the method does; places of the best and the worst, the same one where all are rated alike."""
    wins = meta_judgments.position_wins(((won[:, ~np.eye(points.shape[1], dtype=bool)] + 1) / 2).ravel().tolist())
    ratings = meta_judgments.elo(meta_judgments.battle_matrix(won, *wins), config.meta.regularisation)
    ratings = np.round(ratings, 9)
    return ratings.argmax(-1), np.where(np.ptp(ratings, -1) > 0, ratings.argmin(-1), ratings.argmax(-1))


# --- methods --------------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A method, as far as this world can tell it from another: a function or two. A new one is a row of ARMS."""

    what: str
    score: Callable[[Turn], np.ndarray]
    """Scores responses, [prompts, responses]; the pairs and the error of the judge are made of it."""
    rho: Callable[[int], float] = lambda t: 0.0
    """Length control in iteration t."""
    label: Callable[[Turn], float | np.ndarray] = lambda turn: 1.0
    """C of the iteration's pairs, one for all or [prompts]."""
    judge: Callable[[Turn], Judge] = lambda turn: turn.state.judge
    """The judge after this iteration's training."""


def _meta_rho(t: int) -> float:
    return recipe("meta_rewarding", t).pairs.length_control


def _meta_judge(turn: Turn) -> Judge:
    return meta_judged(turn) if recipe("meta_rewarding", turn.t).meta.trains_judge else turn.state.judge


RHO = 0.32  # arXiv:2407.19594, the value of two of its iterations
ARMS: Mapping[str, Arm] = {
    "oracle": Arm("true quality judges", by_truth),
    "random": Arm("chance judges", by_lot),
    "self_rewarding": Arm("the policy judges", by_judge),
    "self_rewarding_rho": Arm(f"… under length control, rho {RHO}", by_judge, rho=lambda t: RHO),
    "self_rewarding_half": Arm("… each label trusted 0.75: half the step", by_judge, label=lambda turn: 0.75),
    "cream": Arm("CREAM: its reward, labels trusted as far as two models agree", by_likelihood, label=consistency),
    "cream_pair": Arm("… each label trusted by its own prompt's agreement", by_likelihood, label=consistencies),
    "cream_hard": Arm("… the same reward, labels trusted wholly", by_likelihood),
    "meta_rewarding": Arm("Meta-Rewarding: rho, judge training, as scheduled", by_judge, _meta_rho, judge=_meta_judge),
    "meta_rewarding_judge_kept": Arm("… without judge training", by_judge, _meta_rho),
}  # fmt: skip
"""Oracle and random are the yardsticks; half and hard are controls, which only leave out what is claimed to help.
cream_pair was added after the first run: with one C for all pairs CREAM can here do no more than shorten its step."""


# --- the loop -------------------------------------------------------------------------------------------------------


def begin(world: World, judge: Judge, seed: int) -> State:
    """Make M_1, and M_0: M_1 without one sd of merit, without as much of the judge's tastes, and off by chance.

    CREAM's first reward is the way from M_0 to M_1. What the judge is biased towards, that way leans towards, at the
    same ratio to merit: both are taken to come from what the model was taught with.
    """
    way = np.zeros(NAMED + world.others)
    chance = np.random.default_rng(seed_for(seed, "simulate", "M_1")).standard_normal(world.others)
    way[NAMED:] = world.sft_chance * chance / np.linalg.norm(chance)
    way[:NAMED] = 1.0, judge.length / world.merit, judge.self_preference / world.merit
    return State(np.zeros_like(way), judge, -way, None)


def train(arm: Arm, turn: Turn) -> tuple[State, float, float]:
    """Make M_{t+1}: returns it, the share of prompts that gave a pair, and the pairs' label."""
    world, state = turn.world, turn.state
    lengths = np.rint(world.characters * np.exp(world.log_length * turn.named[..., LENGTH])).astype(int).tolist()
    found = [
        pairs.extremes(scores, long, arm.rho(turn.t))
        for scores, long in zip(arm.score(turn).tolist(), lengths, strict=True)
    ]
    taken = [(prompt, *ends) for prompt, ends in enumerate(found) if ends is not None]
    label = np.broadcast_to(arm.label(turn), world.prompts)
    prompts, chosen, rejected = np.array(taken, dtype=int).reshape(-1, 3).T
    features = turn.draws.features
    weights = (2 * label[prompts] - 1) / world.prompts
    mean = state.mean + world.step * (weights @ (features[prompts, chosen] - features[prompts, rejected]))
    return State(mean, arm.judge(turn), state.base, state.mean), len(taken) / world.prompts, float(label.mean())


def judge_error(scores: np.ndarray, quality: np.ndarray) -> float:
    """Return the share of held-out pairs put in the wrong order, a tie one half; both [pairs, 2]."""
    agree = np.sign(scores[:, 0] - scores[:, 1]) * np.sign(quality[:, 0] - quality[:, 1])
    return float((1 - agree).mean() / 2)


MEASURES = (
    "length", "quality", "judge_error", "judge_bias", "judge_fresh", "manner", "drift", "label", "paired",
)  # fmt: skip
"""length: median, as a multiple of M_1's; quality: true, points; judge_error: see there; judge_bias: points written
above the true ones, null where none are; judge_fresh: what each judgment adds, sd in points; manner: sd towards its
own; drift: nats; label, paired: of M_t's pairs."""


def measure(world: World, arm: Arm, state: State, draws: Draws, t: int) -> dict[str, float | None]:
    """Measure M_t, as policy and as judge."""
    asked = held_out(world, state, draws, t)
    scores = arm.score(asked)
    return {
        "length": math.exp(world.log_length * float(state.mean[LENGTH])),
        "quality": quality_of(state.mean, world),
        "judge_error": judge_error(scores, asked.quality),
        "judge_bias": float((scores - asked.quality).mean()) if arm.score is by_judge else None,
        "judge_fresh": state.judge.fresh,
        "manner": float(state.mean[MANNER]),
        "drift": drift(state.mean),
    }


class Case(NamedTuple):
    """A flaw at one strength, in one world, and the arms that are tried on it."""

    flaw: str
    strength: float
    world: World = World()
    arms: tuple[str, ...] = tuple(ARMS)
    assumption: str = ""
    """What the world has otherwise; empty: nothing."""


ASSUMPTIONS: Mapping[str, Mapping[str, float]] = {
    "drift costs nothing": {"drift_cost": 0.0},
    "noise new at each reading": {"lasting": 0.0},
    "noise all of the response": {"lasting": 1.0},
    "comparing sees as badly as judging": {"insight": 0.0},
    "comparing sees the truth": {"insight": 1.0},
    "half the step": {"step": 0.125},
    "twice the step": {"step": 0.5},
    "an eighth of the features nobody prefers": {"others": 128},
    "M0 and M1 differ by merit alone": {"sft_chance": 0.0},
}
"""What could be otherwise in the world, by name; how far an answer hangs on it is measured with each. The last two were
added after the first run, to see what CREAM's answer hangs on."""


def cases(flaws: Sequence[str], probes: Mapping[str, Sequence[str]]) -> list[Case]:
    """List what is run: each flaw at each strength with all arms; and under each assumption the arms of its probe.

    `probes`: flaw to the arms compared on it; these run at the flaw's third strength.
    """
    found = [Case(flaw, strength) for flaw in flaws for strength in FLAWS[flaw].strengths]
    return found + [
        Case(flaw, FLAWS[flaw].strengths[2], replace(World(), **otherwise), tuple(probes[flaw]), assumption)
        for flaw in flaws
        if flaw in probes
        for assumption, otherwise in ASSUMPTIONS.items()
    ]


Row = dict[str, Any]


def simulate(of: Sequence[Case], seeds: int, told: Callable[[int], None] = lambda seed: None) -> list[Row]:
    """Run each case with each of the seeds; a row for each arm and M_t. `told` hears of each finished seed."""
    rows: list[Row] = []
    for seed in range(seeds):
        made: dict[tuple[World, Judge, str], list[Row]] = {}  # without a flaw, all flaws are one case
        for case in of:
            judge = judge_with(case.world, case.flaw, case.strength)
            named = {"assumption": case.assumption, "flaw": case.flaw, "strength": float(case.strength), "seed": seed}
            for name in case.arms:
                run = case.world, judge, name
                if run not in made:
                    made[run] = list(campaign(case.world, ARMS[name], judge, seed))
                rows += [{**named, "arm": name, **row} for row in made[run]]
        told(seed)
    return rows


def campaign(world: World, arm: Arm, judge: Judge, seed: int) -> Iterator[Row]:
    """Run one arm from M_1 on; a row of MEASURES for each M_t."""
    state = begin(world, judge, seed)
    kept = draw(seed, "held out", world.heldout, 2, world.judgments, world.others)
    paired = label = None
    for t in range(1, world.iterations + 2):
        yield {"model": t, **measure(world, arm, state, kept, t), "label": label, "paired": paired}
        if t <= world.iterations:
            draws = draw(seed, f"iteration {t}", world.prompts, world.responses, world.judgments, world.others)
            state, paired, label = train(arm, respond(world, state, draws, t))
