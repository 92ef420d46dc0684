"""Schedules: who sends what when."""

from easyctx.schedule.base import Attention, Schedule
from easyctx.schedule.dist_flash import DistFlash
from easyctx.schedule.ring import Ring
from easyctx.schedule.ulysses import Ulysses, check_heads

__all__ = ["Attention", "DistFlash", "Ring", "Schedule", "Ulysses", "check_heads"]
