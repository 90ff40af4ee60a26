"""The sizes and the patience of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SECTIONS = ("speed", "autograd", "memory", "trace", "cold")


@dataclass(frozen=True)
class Settings:
    """Everything that a run can be asked for.

    Attributes:
        seqs: numbers of tokens at which layers are timed against hand-written ones.
        autograd_seqs: at which they are timed against autograd of the energy; the last has a bar.
        trace_seqs: at which tracing is timed.
        fused_memory, autograd_memory: at which the peak memory is measured, for the exponent.
        rounds, least_rounds, seconds: a comparison ends after so many rounds, or after so many
            seconds if the least number of rounds is done.
        vmap_seqs, vmap_memory: the same for ``lowering="autograd"``, whose memory in training is
            that of (batch, heads, T, T, rank): 3 GiB at T = 512.
        space_seq, recursion_seqs, linear_seqs: numbers of tokens in the sections of ``benchmarks.space``;
            linear attention is compared with softmax attention at ``softmax_seq``.
        packed_seqs: at which packed documents are timed.
        contexts, widths: numbers of tokens seen, and pairs (dim, heads), at which decoding is timed.
        vocab, depth: of the models of ``benchmarks.models``; ``model_seqs`` tokens to train on, ``model_contexts``
            tokens before those that are written.
        routed_depth: blocks of a stack of ``benchmarks.routing``, which takes the last of ``seqs``.
        sample: seconds that one timed sample lasts at least, by repetition.
        processes, derive_processes: fresh processes for the import, and for each energy.
        energies: names of the gallery energies to derive cold; all if empty.
        bars: whether the figures are held against the bars.
    """

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    threads: int = 1
    seed: int = 0
    batch: int = 4
    dim: int = 256
    heads: int = 4
    rank: int = 64
    hidden: int = 704
    seqs: tuple[int, ...] = (256, 1024, 2048)
    autograd_seqs: tuple[int, ...] = (1024, 2048)
    trace_seqs: tuple[int, ...] = (1024, 2048)
    fused_memory: tuple[int, ...] = (512, 1024, 2048, 4096)
    autograd_memory: tuple[int, ...] = (512, 1024, 2048)
    vmap_seqs: tuple[int, ...] = (256,)
    vmap_memory: tuple[int, ...] = (64, 128, 256)
    space_seq: int = 1024
    recursion_seqs: tuple[int, ...] = (256, 1024)
    linear_seqs: tuple[int, ...] = (1024, 2048, 4096, 8192)
    softmax_seq: int = 4096
    packed_seqs: tuple[int, ...] = (2048, 4096)
    contexts: tuple[int, ...] = (4096, 16384)
    widths: tuple[tuple[int, int], ...] = ((256, 4), (512, 8))
    vocab: int = 4096
    depth: int = 4
    routed_depth: int = 6
    model_seqs: tuple[int, ...] = (256, 1024)
    model_contexts: tuple[int, ...] = (512, 2048, 8192)
    rounds: int = 60
    least_rounds: int = 7
    seconds: float = 15.0
    sample: float = 0.02
    processes: int = 7
    derive_processes: int = 3
    energies: tuple[str, ...] = ()
    sections: tuple[str, ...] = SECTIONS
    bars: bool = True

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def quick(self) -> Settings:
        """The same on tiny sizes, to see that everything runs; its figures mean nothing."""
        return replace(
            self,
            batch=2,
            dim=32,
            heads=2,
            rank=16,
            hidden=48,
            seqs=(16,),
            autograd_seqs=(16,),
            trace_seqs=(16,),
            fused_memory=(64, 128),
            autograd_memory=(64, 128),
            vmap_seqs=(16,),
            vmap_memory=(32, 64),
            space_seq=16,
            recursion_seqs=(16,),
            linear_seqs=(64, 128),
            softmax_seq=64,
            packed_seqs=(16,),
            contexts=(16,),
            widths=((32, 2),),
            vocab=64,
            depth=1,
            routed_depth=1,
            model_seqs=(16,),
            model_contexts=(16,),
            rounds=3,
            least_rounds=3,
            seconds=0.5,
            sample=0.0,
            processes=1,
            derive_processes=1,
            bars=False,
        )
