"""Which interval a ratio may occupy: bands of f-divergence balls, fixed clips, other regions, and radii that match."""

from bandpo._deprecations import moved_within as _moved_within
from bandpo.bounds.band import DCPO as DCPO
from bandpo.bounds.band import Band as Band
from bandpo.bounds.band import Bounds as Bounds
from bandpo.bounds.band import Clip as Clip
from bandpo.bounds.band import Radius as Radius
from bandpo.bounds.band import RatioBounds as RatioBounds
from bandpo.bounds.band import in_band as in_band
from bandpo.bounds.band import ratio_bounds as ratio_bounds
from bandpo.bounds.calibration import match_radius as match_radius
from bandpo.bounds.calibration import max_shift as max_shift
from bandpo.bounds.calibration import outside_fraction as outside_fraction
from bandpo.bounds.calibration import radius_for as radius_for
from bandpo.bounds.combined import Intersection as Intersection
from bandpo.bounds.combined import Union as Union
from bandpo.bounds.edges import outside as outside
from bandpo.bounds.regions import BySign as BySign
from bandpo.bounds.regions import Sides as Sides
from bandpo.bounds.regions import TopK as TopK
from bandpo.bounds.regions import kl3_clip as kl3_clip
from bandpo.bounds.regions import log_clip as log_clip
from bandpo.bounds.regions import topk_divergence as topk_divergence

__getattr__ = _moved_within(
    __name__,
    {
        "Balanced": "experimental.Balanced",
        "Elastic": "experimental.Elastic",
        "clip_fraction": "bounds.outside_fraction",
    },
)
