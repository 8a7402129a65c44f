"""An earlier name."""

from metapl.runs.sealed import misfit as misfit
from metapl.runs.sealed import misfit_entries as misfit_entries
