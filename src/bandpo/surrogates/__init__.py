"""What happens at the edge of the interval, token by token or by sequence, and weights for the sampler's mismatch."""

from bandpo._deprecations import moved_within as _moved_within
from bandpo.surrogates.corrections import TIS as TIS
from bandpo.surrogates.corrections import Correction as Correction
from bandpo.surrogates.corrections import IcePop as IcePop
from bandpo.surrogates.filters import SequenceFilter as SequenceFilter
from bandpo.surrogates.projected import Projected as Projected
from bandpo.surrogates.sequence import future_weighted as future_weighted
from bandpo.surrogates.sequence import gamma_weighted as gamma_weighted
from bandpo.surrogates.sequence import geometric_mean as geometric_mean
from bandpo.surrogates.sequence import mirror_descent as mirror_descent
from bandpo.surrogates.sequence import tapered as tapered
from bandpo.surrogates.stops import never as never
from bandpo.surrogates.stops import stops as stops
from bandpo.surrogates.token import MAX_LOG_RATIO as MAX_LOG_RATIO
from bandpo.surrogates.token import Surrogate as Surrogate
from bandpo.surrogates.token import aspo as aspo
from bandpo.surrogates.token import clip as clip
from bandpo.surrogates.token import detach as detach
from bandpo.surrogates.token import dual_clip as dual_clip
from bandpo.surrogates.token import hold as hold
from bandpo.surrogates.token import kl_penalty as kl_penalty
from bandpo.surrogates.token import log_quadratic as log_quadratic
from bandpo.surrogates.token import mask as mask
from bandpo.surrogates.token import quadratic as quadratic
from bandpo.surrogates.token import quadratic_tv as quadratic_tv
from bandpo.surrogates.token import ratio as ratio
from bandpo.surrogates.token import reinsert as reinsert
from bandpo.surrogates.token import soft as soft
from bandpo.surrogates.token import soft_edge as soft_edge
from bandpo.surrogates.token import traits as traits
from bandpo.surrogates.token import two_sided as two_sided

__getattr__ = _moved_within(
    __name__,
    {name: f"experimental.{name}" for name in ("clip_cov", "kl_cov", "log_stabilized")},
)
