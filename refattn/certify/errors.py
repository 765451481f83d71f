"""What certification can refuse. These errors stand alone: certify imports nothing of refattn."""


class CertifyError(ValueError):
    """An operation, option or value that certification does not define."""


class Ambiguous(CertifyError):
    """No permitted precision decides the rounding of an element, or no one float64 serves it."""


class Disagreement(CertifyError):
    """The second engine computes another value than the one it was given to prove."""


class Undecided(Exception):  # noqa: N818
    """A comparison of balls that the present precision does not decide; never leaves certify."""
