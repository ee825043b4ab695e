"""The library's own warnings."""


class AdderWarning(UserWarning):
    """Something works, but hardly as meant: adders that cannot learn, products without native code.

    Example:
      >>> import warnings, jadder
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("error", jadder.AdderWarning)  # to be stopped by it
    """
