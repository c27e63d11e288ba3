"""What a person would check by hand before a run, and when it does not go well.

    machine.py      this machine alone: memory, disk, limits, versions         ┐
    gpus.py         its GPUs                                                   │
    network.py      its address, its ports, the other nodes                    ├─► Check   one line, one remedy
    bucket.py       the store: create-once, rights, speed, rules, clock        │
    data.py         the prepared data                                          │
    saving.py       whether a node that must leave can save its state in time  ┘

`examine.py` has all checks in the order of `elastic-pt doctor`, `at_start.py` the ones that an agent makes at its
start. A check that cannot be made is left out: it is never shown as well. `requirements.py` has what a node refuses
to start without. docs/deployment/doctor.md tells what each check is for.
"""
