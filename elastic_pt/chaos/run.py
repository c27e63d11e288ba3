"""One chaos run from its scenario to its result: plays, judges, and writes `result.json`. The process of a chaos run."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from elastic_pt.chaos.oracles import Case, judge
from elastic_pt.chaos.play import Happening, Player
from elastic_pt.chaos.result import Cost, Result
from elastic_pt.chaos.scenario import Scenario
from elastic_pt.chaos.workbench import Workbench
from elastic_pt.errors import ElasticPtError
from elastic_pt.report.goodput import Goodput

RESULT: Final = "result.json"


def run_scenario(
    workbench: Workbench,
    scenario: Scenario,
    seed: int,
    out: Path,
    *,
    network: bool,
    replay: str = "",
    tell: Callable[[Happening], None] = lambda happening: None,
) -> Result:
    """Play a scenario once in the new directory `out`, and judge it.

    `network`: whether the nodes get networks of their own. `replay`: the command that plays it again. `tell` hears of all
    that happens, as it happens. Raises `ConfigError` if this machine cannot play it.
    """
    out.mkdir(parents=True)
    site = workbench.site(scenario, out)
    tell(Happening(0.0, "reference", "first the undisturbed run that judges it"))
    undisturbed = workbench.undisturbed(site.config)
    played = Player(
        scenario, seed, site.config, out, network=network, bucket=site.bucket, tell=tell
    ).play()
    case = Case(played, undisturbed)
    verdicts = judge(case)
    costs = tuple(Cost(each.number, None, None) for each in played.struck)
    goodput: Goodput | None = None
    # A log that cannot be read has been objected to.
    with suppress(ElasticPtError):
        costs, goodput = case.costs, case.goodput
    result = Result(played, verdicts, costs, goodput, replay)
    (out / RESULT).write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    return result
