"""What can be wrong with a draft plan."""


class PlanError(ValueError):
    """A draft plan that does not fit its model, or whose parts do not fit together."""
