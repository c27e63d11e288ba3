"""Copies the committed steps of a run to other tools: TensorBoard, a JSONL file, Weights & Biases.

    log, history/ ─► history.read_batches ─► Batch ─► sync.Copy ─► Sink.write   each sink from its own position on

A sink is its own record of what it holds. There is no state file that could disagree with it. A step is written when
it is first committed. A later line about the same step is skipped: it was computed again after a quarantined
checkpoint. So what a sink holds does not depend on when, or how often, it was filled.

Runs in the command line's process, and only reads the run.
"""
