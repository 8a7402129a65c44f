"""An earlier name."""

from metapl.runs.sealed import irregular as irregular
from metapl.runs.sealed import open_plain as open_plain
from metapl.runs.sealed import read_plain as read_plain
from metapl.runs.sealed import refuse_irregular as refuse_irregular
