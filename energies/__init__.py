"""The gallery: one energy a file, with its formula, its source and its code."""

if __name__ != "cem.energies":
    raise ImportError("this folder is a part of the package: type `import cem.energies`")

from .alibi_interaction import alibi_interaction
from .diagonal_plus_low_rank import (
    diagonal_plus_low_rank,
    diagonal_plus_low_rank_full,
    rotary_diagonal_plus_low_rank,
)
from .energy_transformer import energy_transformer
from .gated import gated, gated_by, gated_gelu, gated_relu, gated_sigmoid, gated_silu
from .gated_linear_attention import gated_linear_attention
from .grouped_interaction import grouped_interaction
from .interaction import interaction
from .loosely_tied import (
    loosely_tied_gated,
    loosely_tied_gated_by,
    loosely_tied_interaction,
    loosely_tied_interaction_by,
)
from .memory import memory
from .mixture_of_experts import (
    mixture_of_experts,
    mixture_of_experts_by,
    mixture_of_experts_relu,
    mixture_of_experts_silu,
)
from .normalised_interaction import normalised_interaction
from .parallel_block import parallel_block
from .partly_tied import (
    partly_tied_gated,
    partly_tied_gated_by,
    partly_tied_interaction,
    untied_interaction,
)
from .plain import plain, plain_by, plain_gelu, plain_relu, plain_silu, plain_softplus
from .polynomial_memory import polynomial_memory, polynomial_memory_by
from .quadratic_well import quadratic_well
from .relative_interaction import relative_interaction, relative_interaction_by
from .rotary_interaction import rotary_interaction, rotary_interaction_by
from .sink_interaction import sink_interaction
from .sliding_window_interaction import (
    sliding_window_interaction,
    sliding_window_interaction_by,
)
from .soft_capped_interaction import soft_capped_interaction
from .sparse_coding import sparse_coding
from .sparse_memory import sparse_memory, sparse_memory_by
from .sparsification import sparsification
from .squared_interaction import squared_interaction
from .structured_interaction import (
    collaborative_interaction,
    dense_interaction,
    diagonal_interaction,
    symmetric_interaction,
    symmetrised_interaction,
    tempered_interaction,
)
from .subspace_compression import subspace_compression
from .token_parameters import (
    consistent_token_parameters,
    consistent_token_parameters_by,
    token_parameters,
    token_parameters_by,
    token_parameters_relu,
    unnormalised_token_parameters,
    unnormalised_token_parameters_by,
)
from .two_sided_gated import (
    two_sided_gated,
    two_sided_gated_by,
    two_sided_gated_gelu,
    two_sided_gated_relu,
    two_sided_gated_sigmoid,
    two_sided_gated_silu,
)

__all__ = [
    "alibi_interaction",
    "collaborative_interaction",
    "consistent_token_parameters",
    "consistent_token_parameters_by",
    "dense_interaction",
    "diagonal_interaction",
    "diagonal_plus_low_rank",
    "diagonal_plus_low_rank_full",
    "energy_transformer",
    "gated",
    "gated_by",
    "gated_gelu",
    "gated_linear_attention",
    "gated_relu",
    "gated_sigmoid",
    "gated_silu",
    "grouped_interaction",
    "interaction",
    "loosely_tied_gated",
    "loosely_tied_gated_by",
    "loosely_tied_interaction",
    "loosely_tied_interaction_by",
    "memory",
    "mixture_of_experts",
    "mixture_of_experts_by",
    "mixture_of_experts_relu",
    "mixture_of_experts_silu",
    "normalised_interaction",
    "parallel_block",
    "partly_tied_gated",
    "partly_tied_gated_by",
    "partly_tied_interaction",
    "plain",
    "plain_by",
    "plain_gelu",
    "plain_relu",
    "plain_silu",
    "plain_softplus",
    "polynomial_memory",
    "polynomial_memory_by",
    "quadratic_well",
    "relative_interaction",
    "relative_interaction_by",
    "rotary_diagonal_plus_low_rank",
    "rotary_interaction",
    "rotary_interaction_by",
    "sink_interaction",
    "sliding_window_interaction",
    "sliding_window_interaction_by",
    "soft_capped_interaction",
    "sparse_coding",
    "sparse_memory",
    "sparse_memory_by",
    "sparsification",
    "squared_interaction",
    "subspace_compression",
    "symmetric_interaction",
    "symmetrised_interaction",
    "tempered_interaction",
    "token_parameters",
    "token_parameters_by",
    "token_parameters_relu",
    "two_sided_gated",
    "two_sided_gated_by",
    "two_sided_gated_gelu",
    "two_sided_gated_relu",
    "two_sided_gated_sigmoid",
    "two_sided_gated_silu",
    "unnormalised_token_parameters",
    "unnormalised_token_parameters_by",
    "untied_interaction",
]
