"""How an operator steers a run through its log, and how its agents answer. Pure: views and requests in, records out.

    elastic-pt pause ─► ask ─► CONTROL ─► agents obey at a step boundary ─► the answer ─► is_done ─► --wait returns

    checkpoint   the answer is a COMMIT with the request's index
    pause        a CONTROL by the first node, once all workers have stopped (`carried_out`)
    resume       a later generation's first step
    drain        a CONTROL by the node itself, when it leaves (`carried_out`)
    stop         STOP

A request holds until it is answered, a pause until a RESUME, whatever happens to the agents. STOP and REOPEN end
all of them. Each CONTROL names all requests that hold, so a reader needs only the newest one.
"""

from dataclasses import replace

from elastic_pt.errors import FencedError
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Control, Request, Verb


def ask(view: RunView, request: Request) -> Control:
    """The record that makes a request after `view`. It replaces an older one of the same verb and node."""
    made = replace(request, index=view.length)
    ended = Verb.PAUSE if request.verb is Verb.RESUME else request.verb
    kept = [each for each in view.requests if (each.verb, each.node) != (ended, request.node)]
    standing = kept if request.verb is Verb.RESUME else [*kept, made]
    return Control(made, tuple(standing), _newest_step(view))


def carried_out(view: RunView, request: Request) -> Control:
    """The record that says that a pause or a drain is done. Raises `FencedError` if it is not asked for any more."""
    if request not in view.requests:
        raise FencedError(f"not asked for any more: {request}")
    done = replace(request, done=True)
    kept = [each for each in view.requests if each != request]
    if request.verb is Verb.PAUSE:
        # Everything is committed: no checkpoint is wanting.
        kept = [done, *(each for each in kept if each.verb is not Verb.CHECKPOINT)]
    return Control(done, tuple(kept), _newest_step(view))


def is_done(view: RunView, request: Request, before: RunView) -> bool:
    """Whether a request that was made has been carried out, or the run has ended. `before` is the view when it was made."""
    if view.stop is not None:
        return True
    if request.verb is Verb.RESUME:
        pause = before.request(Verb.PAUSE)
        if pause is None or not pause.done:
            return True
        recovered = 0 if view.recovery is None else view.recovery.number
        return recovered > before.generation_number
    held = view.request(request.verb, request.node)
    return held is None or held.index < request.index or held.done


def _newest_step(view: RunView) -> int:
    return view.checkpoints[0].step if view.checkpoints else 0
