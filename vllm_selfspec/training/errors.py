"""What can go wrong in making an exit layer, apart so that naming it loads no torch."""


class TextsError(RuntimeError):
    """Texts that could not be generated."""


class TrainError(RuntimeError):
    """A training that cannot be made, or gone on with."""
