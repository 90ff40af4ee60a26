"""The Hugging Face Trainer with whole checkpoints, an exact held-out loss, and decay on matrices only.

Legend: B batch, T tokens, V vocabulary, N windows.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

import transformers
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import RandomSampler

from .optimizer import Muon, decayed, parameter_groups

# A checkpoint is written in here and then moved, so that one that has its place is whole.
PARTIAL = "checkpoint.partial"


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` for pretraining; what is said here is all that differs.

    * A checkpoint is written beside its place, flushed to the disk and renamed: one that is found
      is whole, wherever the run was killed.
    * ``eval_loss`` is the sum of the losses of all held-out tokens over their number, in nats, where
      the original takes the mean over batches; ``eval_bits_per_byte`` is the same per byte of text.
    * Weight decay is for parameters of two axes and more, whatever their names.
    * An epoch is whole training steps, whether their windows are accumulated, on several devices, or not.
    * FSDP that was asked for and not set up is refused; on a CPU it would silently be DDP.

    Args:
        bytes_per_token: of the held-out text.
        muon: whether the hidden matrices are updated by Muon.
        groups: learning rates and decay of some, see :func:`cem.lm.optimizer.parameter_groups`.
        model, args, **keywords: as the original.

    Raises:
        ValueError: FSDP was asked for and is not what runs.
    """

    def __init__(
        self, model, args, *, bytes_per_token: float, muon: bool = False, groups=None, **keywords
    ):
        def metrics(found: transformers.EvalPrediction) -> dict[str, float]:
            nats = found.predictions.sum() / (found.label_ids[:, 1:] != -100).sum()
            return {"nats": nats, "bits_per_byte": nats / math.log(2) / bytes_per_token}

        if args.world_size == 1:
            _check_engine(args, DistributedType.NO)
        super().__init__(
            model,
            args,
            data_collator=transformers.default_data_collator,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=window_nats,
            **keywords,
        )
        self.muon, self.groups = muon, groups or {}
        self._run_folder = None
        _check_engine(args, self.accelerator.distributed_type)

    def evaluation_loop(self, *args, **keywords):
        output = super().evaluation_loop(*args, **keywords)
        prefix = keywords.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = output.metrics.pop(f"{prefix}_nats")
        return output

    def _get_train_sampler(self, train_dataset=None):
        # An epoch is whole training steps, so that it is the same however a step is divided.
        sampler = super()._get_train_sampler(train_dataset)
        if not self.args.dataloader_drop_last or type(sampler) is not RandomSampler:
            return sampler
        windows, sequences = len(sampler), self.get_total_train_batch_size(self.args)
        return RandomSampler(sampler.data_source, num_samples=windows - windows % sequences)

    def get_eval_dataloader(self, eval_dataset=None):
        # Windows that do not fill a batch are left out of training, and of nothing else.
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def training_step(self, model, inputs, *args, **keywords):
        # The original can count tokens too, but waits for the device to do so.
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        return super().training_step(model, inputs, *args, **keywords)

    def get_decay_parameter_names(self, model) -> list[str]:
        return decayed(model)

    def create_optimizer(self, model=None):
        if self.optimizer is None and (self.muon or self.groups):
            args, model = self.args, self.model if model is None else model
            groups = parameter_groups(
                model, args.learning_rate, args.weight_decay, self.groups, self.muon
            )
            if self.muon:
                betas = (args.adam_beta1, args.adam_beta2)
                self.optimizer = Muon(groups, betas=betas, eps=args.adam_epsilon)
            else:
                made, options = self.get_optimizer_cls_and_kwargs(args, model)
                self.optimizer = made(groups, **options)
        return super().create_optimizer(model)

    def _get_output_dir(self, trial):
        return self._run_folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._run_folder = str(folder / PARTIAL)
        if self.args.should_save:
            shutil.rmtree(self._run_folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_folder = None
        partial = folder / PARTIAL / name
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(partial / "trainer_state.json"))
        if self.args.should_save:
            _flush(partial)
            shutil.rmtree(folder / name, ignore_errors=True)
            partial.rename(folder / name)
            partial.parent.rmdir()
            self._forget_old(folder)
        self.accelerator.wait_for_everyone()

    def _forget_old(self, folder: Path) -> None:
        limit = self.args.save_total_limit
        old = checkpoints(folder)[: -max(1, limit)] if limit else []
        for checkpoint in old:
            if str(checkpoint) != self.state.best_model_checkpoint:
                shutil.rmtree(checkpoint, ignore_errors=True)


def _check_engine(args, got: DistributedType) -> None:
    wanted = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if wanted and got is not DistributedType.FSDP:
        raise ValueError(
            f"FSDP was asked for and is not what runs: got {got.value} on {args.device.type}; "
            "start it on GPUs with `torchrun --nproc-per-node GPUS -m cem train ...`, "
            "or leave out `trainer.fsdp`"
        )


def window_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of each window, in nats.

    Args:
        logits: scores of the next token, (B, T, V); of a tuple, its first.
        labels: (B, T); -100 is not scored. The label of token t is predicted at t - 1.

    Returns:
        sums, shape (B,), float64.

    >>> import torch
    >>> window_nats(torch.zeros(1, 3, 4), torch.tensor([[0, -100, 2]]))  # one token: log 4
    tensor([1.3863], dtype=torch.float64)
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    scores = logits[:, :-1].float().transpose(1, 2)  # (B, V, T - 1)
    nats = F.cross_entropy(scores, labels[:, 1:], ignore_index=-100, reduction="none")
    return nats.double().sum(-1)


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def _flush(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
