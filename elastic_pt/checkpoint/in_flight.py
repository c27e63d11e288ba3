"""Whether a checkpoint on its way to the bucket may still be committed, and by which node: pure decisions from the log.

    generation 4 saves step 120 ─► generation 5 resumes at step 125 ─► generation 6 resumes at step 130
                                   the state of 120 is an ancestor of what these train: it may be committed

An upload outlives its generation. But a COMMIT of a state that is no ancestor of the state in training would mix two
lineages: the steps after it were done from another state. With exact numerics their bits are equal, with native
numerics they are not. So each later generation must have resumed at or after the step of the checkpoint.
"""

from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Member


def over(view: RunView, generation: int, step: int) -> str:
    """Why the checkpoint of a generation and step cannot be committed after `view`; empty if it still can.

    COMMITs stay in the order of steps: a committed checkpoint of the same or a later step ends all attempts before it.
    """
    if view.checkpoints and view.checkpoints[0].step >= step:
        return f"step {view.checkpoints[0].step} is committed"
    if view.stop is not None:
        return f"the run has ended: {view.stop.reason}"
    if all(each.number != generation for each in view.generations):
        return f"the log as it was read has no generation {generation}"
    for each in view.generations:
        if each.number > generation and each.resume_step < step:
            return (
                f"generation {each.number} resumed from step {each.resume_step}, before step {step}"
            )
    if committer(view, generation) is None:
        return (
            f"no member of generation {generation} is left in generation {view.generation_number}"
        )
    return ""


def committer(view: RunView, generation: int) -> Member | None:
    """The node that commits the checkpoints of a generation now; None if there is none.

    The first member of the newest generation that was a member of that one: it knows which steps are due.
    """
    before = next((each for each in view.generations if each.number == generation), None)
    newest = view.generation
    if before is None or newest is None:
        return None
    return next(
        (each for each in newest.members if before.rank_of(each.incarnation) is not None), None
    )
