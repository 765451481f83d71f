"""What certification can refuse. These errors stand alone: certify imports nothing of refattn."""


class CertifyError(ValueError):
    """An operation, option or value that certification does not define."""


class Ambiguous(CertifyError):  # noqa: N818
    """No permitted precision decides the rounding of an element, or no one float64 serves it."""


class Midpoint(Ambiguous):
    """The float64 of an element is a midpoint of a narrower format, and the element is not.

    Rounding the float64 once more then goes the wrong way; no precision can mend that.
    """

    def __init__(self, value: float, narrow: str) -> None:
        """Keep the float64 and the name of the narrower format."""
        super().__init__(
            f"rounding to float64 and then to {narrow} differs from rounding once;"
            ' redraw the input, or pass midpoints="record"'
        )
        self.value = value
        self.narrow = narrow


class Disagreement(CertifyError):  # noqa: N818
    """The second engine computes another value than the one it was given to prove."""


class Undecided(Exception):  # noqa: N818
    """A comparison of balls that the present precision does not decide; never leaves certify."""
