"""Interrupts that are put off while a login is under way."""


def raise_pending() -> None:
    """Raise an interrupt that arrived during this login and was put off.

    A login calls it while no token can exist yet.
    """
