"""What a training takes, before there is a device to run it on."""

from metapl.apps.planning.rehearsal import Rehearsal, rehearse

__all__ = ["Rehearsal", "rehearse"]
