"""What an estimator or a problem may require of the student's layout, and what the layouts offer."""

from enum import Enum


class Capability(Enum):
    """A way to use the student that not every layout has."""

    ONE_PROCESS = "the student's weights and batch as a whole"
    FORWARD_AD = "a pass of the student in forward mode"
    CURVATURE = "second derivatives of the inner loss in the student's weights"
    THROUGH_INPUT = "a derivative through the student's input"


ONE_PROCESS, FORWARD_AD, CURVATURE, THROUGH_INPUT = Capability
