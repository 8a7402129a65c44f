"""The training of another loop, followed by hooks and differentiated afterwards.

From bottom to top: :mod:`calls` reads what a network is called with as a batch of examples, and
:mod:`watching` sees losses and clipping. :mod:`folder` has the files of a recording. :mod:`network`
is the recorded network at any weights. :mod:`first_step` says what cannot be followed;
:mod:`recorder` writes while the loop runs. :mod:`contents` reads what was written, :mod:`replay`
goes through the steps again, forward and back, and :mod:`recording` is what a user holds.
"""

from metapl.attribution.recording.recording import RecordedAttribution, Recording, record

__all__ = ["RecordedAttribution", "Recording", "record"]
