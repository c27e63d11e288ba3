"""What an operator does in the middle of it all: the requests of `elastic-pt pause`, `resume`, `drain` and `checkpoint`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from elastic_pt.chaos.kinds.kind import LEFT, Action, Evidence, Kind, Strike, each
from elastic_pt.runlog.records import Verb

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena


def _ask(verb: Verb) -> Action:
    def act(arena: "Arena", _: Strike) -> None:
        arena.run.request(verb)

    return act


def _answered(verb: Verb) -> Evidence:
    return Evidence(answers=frozenset({verb}), names_node=False)


OF_OPERATOR: Final = (
    Kind(
        "operator_pauses",
        "an operator pauses the run, and resumes it",
        strike=_ask(Verb.PAUSE),
        heal=_ask(Verb.RESUME),
        evidence=_answered(Verb.PAUSE),
    ),
    Kind(
        "operator_checkpoints",
        "an operator asks for a checkpoint",
        strike=_ask(Verb.CHECKPOINT),
        evidence=_answered(Verb.CHECKPOINT),
    ),
    Kind(
        "operator_drains",
        "an operator asks that a node leaves",
        strike=each(lambda arena, node: arena.run.request(Verb.DRAIN, node)),
        ends_node=True,
        evidence=replace(LEFT, events=frozenset({"drained"}), answers=frozenset({Verb.DRAIN})),
    ),
)
