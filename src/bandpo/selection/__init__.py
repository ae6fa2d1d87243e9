"""Train on less: which prompts and completions, weighted so that the expected gradient stays; and dense packing of the rest."""

from bandpo.selection.packing import PackedBatch as PackedBatch
from bandpo.selection.packing import density as density
from bandpo.selection.packing import pack_rows as pack_rows
from bandpo.selection.packing import packed_logprobs as packed_logprobs
from bandpo.selection.packing import packing_error as packing_error
from bandpo.selection.packing import window_pack as window_pack
from bandpo.selection.pruning import Informative as Informative
from bandpo.selection.pruning import PromptScores as PromptScores
from bandpo.selection.pruning import Pruning as Pruning
from bandpo.selection.pruning import Selection as Selection
from bandpo.selection.pruning import Selector as Selector
from bandpo.selection.pruning import check_nothing_lost as check_nothing_lost
from bandpo.selection.pruning import effective_sample_size as effective_sample_size
from bandpo.selection.pruning import stratified as stratified
