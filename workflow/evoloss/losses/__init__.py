"""Learned losses as ``torch.nn`` modules, and the files they are kept in."""

from evoloss.losses.learned_loss import LearnedLoss
from evoloss.losses.loss_file import load, read_loss, save_loss

__all__ = ["LearnedLoss", "load", "read_loss", "save_loss"]
