"""What happens at the edge of the interval, token by token or by sequence, and weights for the sampler's mismatch."""

from bandpo.surrogates.corrections import TIS as TIS
from bandpo.surrogates.corrections import Correction as Correction
from bandpo.surrogates.corrections import IcePop as IcePop
from bandpo.surrogates.sequence import clip_cov as clip_cov
from bandpo.surrogates.sequence import geometric_mean as geometric_mean
from bandpo.surrogates.sequence import kl_cov as kl_cov
from bandpo.surrogates.sequence import tapered as tapered
from bandpo.surrogates.token import MAX_LOG_RATIO as MAX_LOG_RATIO
from bandpo.surrogates.token import Surrogate as Surrogate
from bandpo.surrogates.token import aspo as aspo
from bandpo.surrogates.token import clip as clip
from bandpo.surrogates.token import detach as detach
from bandpo.surrogates.token import dual_clip as dual_clip
from bandpo.surrogates.token import hold as hold
from bandpo.surrogates.token import kl_penalty as kl_penalty
from bandpo.surrogates.token import log_stabilized as log_stabilized
from bandpo.surrogates.token import mask as mask
from bandpo.surrogates.token import quadratic as quadratic
from bandpo.surrogates.token import quadratic_tv as quadratic_tv
from bandpo.surrogates.token import ratio as ratio
from bandpo.surrogates.token import reinsert as reinsert
from bandpo.surrogates.token import soft as soft
from bandpo.surrogates.token import soft_edge as soft_edge
from bandpo.surrogates.token import traits as traits
from bandpo.surrogates.token import two_sided as two_sided
