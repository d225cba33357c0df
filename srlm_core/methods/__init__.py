"""A method is a frozen record: an ordered tuple of steps, and how M_{t+1} is trained. No base class, no registry."""

from srlm_core.methods import self_rewarding
from srlm_core.methods.record import Method

METHODS: dict[str, Method] = {"self_rewarding": self_rewarding.METHOD}
