"""What goes wrong at the edges: each message says what, where, and what to type."""


class HatError(Exception):
    """Every error that this package raises on purpose."""


class ConfigError(HatError):
    """A configuration key or value cannot be used."""


class DataError(HatError):
    """A data file, a table or a checkpoint cannot be used."""


class BackboneError(HatError):
    """A pretrained model cannot be loaded, or cannot do what is asked of it."""
