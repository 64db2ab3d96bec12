"""What can be said of a run before anything is loaded: its batches, data, steps and learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from mmd2v.config.batch_plan import BatchPlan, plan_batches, total_steps
from mmd2v.config.schema import Config
from mmd2v.data.stream import TrainFacts, train_facts
from mmd2v.data.token_batches import TokenOrder
from mmd2v.distributed.coordination import from_main_rank
from mmd2v.distributed.environment import World
from mmd2v.train.schedule import Schedule, build_schedule
from mmd2v.train.token_batches import prepare_token_order


@dataclass(frozen=True)
class Outlook:
    """The same on every rank.

    Attributes:
        plan: how a batch is dealt to ranks and micro-batches.
        facts: of the training set.
        tokens: the order of a run in steps of tokens; None in steps of samples.
        steps: of the whole run.
        schedule: learning rates by step.
    """

    plan: BatchPlan
    facts: TrainFacts
    tokens: TokenOrder | None
    steps: int
    schedule: Schedule

    @property
    def samples(self) -> int:
        """Samples of an epoch, or texts in a run in steps of tokens."""
        return self.facts.samples if self.tokens is None else self.tokens.texts


def look_ahead(config: Config, world: World) -> Outlook:
    """Find out; every rank must call it. Raises UserError for what is wrong with the config or its data."""
    plan: BatchPlan = from_main_rank(lambda: plan_batches(config, world.size))
    batch = None if config.data.batch_tokens else plan.global_batch
    facts: TrainFacts = from_main_rank(lambda: train_facts(config.data, seed=config.seed, batch=batch))
    tokens = prepare_token_order(config, plan.ranks * plan.accumulation)
    steps = total_steps(config, plan, facts.samples, None if tokens is None else tokens.epoch_steps)
    schedule: Schedule = from_main_rank(lambda: build_schedule(config.optimizer, steps))
    return Outlook(plan, facts, tokens, steps, schedule)
