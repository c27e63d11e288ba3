"""What a check raises."""


class Violation(Exception):
    """An invariant does not hold; `rule` names it."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
